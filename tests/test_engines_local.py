"""The engine in this process, on a really trained small model in float32."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from nibble.engines.base import Chunk, EngineInfo, Sampling
from nibble.engines.local import LocalEngine
from nibble.engines.threaded import Request
from nibble.errors import DeviceError, FormatError, ModelError, NibbleError
from nibble.prompts import choose_template

ONCE = "Once upon a time"


def user(text: str) -> list:
    return [{"role": "user", "content": text}]


def ask(engine, messages, stop=None, **sampling) -> tuple[str, Chunk]:
    """The whole text and the last chunk."""
    chunks = list(engine.stream(messages, Sampling(**sampling), stop or threading.Event()))
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    text = "".join(chunk.text for chunk in chunks)
    return text if chunks[-1].full_text is None else chunks[-1].full_text, chunks[-1]


@pytest.fixture(scope="module")
def engine(stories: Path) -> Iterator[LocalEngine]:
    engine = LocalEngine.load(stories, "", dtype="float32")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(stories: Path):
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(stories)


def generated(reference, prompt: str, **options) -> str:
    model, tokenizer = reference
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**inputs, **options)[0].tolist()
    skip = len(tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True))
    return tokenizer.decode(ids, skip_special_tokens=True)[skip:]


PROMPTS = (ONCE, "Tom and Lily", "The dog was", "One day, a bird " * 12, "x")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_that_of_generate(engine, reference, prompt):
    text, last = ask(engine, user(prompt), max_new_tokens=60)
    assert text == generated(reference, prompt, max_new_tokens=60, do_sample=False)
    assert last.tokens == 60 or last.finish_reason == "stop"


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.7}, {"temperature": 1.3, "top_k": 3},
     {"temperature": 0.7, "repetition_penalty": 1.3, "top_k": 0}],
)  # fmt: skip
def test_sampled_text_is_that_of_generate_with_the_same_seed(engine, reference, options):
    text, _ = ask(engine, user(ONCE), max_new_tokens=40, seed=7, **options)
    torch.manual_seed(7)
    assert text == generated(reference, ONCE, max_new_tokens=40, do_sample=True, **options)


def test_a_repetition_penalty_works_without_sampling(engine, reference):
    text, _ = ask(engine, user(ONCE), max_new_tokens=40, repetition_penalty=1.5)
    assert text == generated(reference, ONCE, max_new_tokens=40, do_sample=False, repetition_penalty=1.5)


def test_a_seed_gives_the_same_answer_whatever_else_draws_random_numbers(engine):
    first, _ = ask(engine, user(ONCE), max_new_tokens=40, temperature=1.0, seed=3)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    second, _ = ask(engine, user(ONCE), max_new_tokens=40, temperature=1.0, seed=3)
    other, _ = ask(engine, user(ONCE), max_new_tokens=40, temperature=1.0, seed=4)
    assert first == second != other
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0, "top_p": 0.1, "top_k": 5}, {"top_k": 0, "top_p": 1.0}, {"temperature": 5.0, "top_k": 1}],
)
def test_settings_that_come_to_greedy_are_greedy(engine, options):
    assert ask(engine, user(ONCE), max_new_tokens=20, **options)[0] == ask(engine, user(ONCE), max_new_tokens=20)[0]


class StopAt(threading.Event):
    """A stop that sets itself once it was looked at this often."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks < 0 or super().is_set()


@pytest.mark.parametrize("when", [0, 1, 2, 7, 39])
def test_a_stop_keeps_the_text_so_far_and_the_next_turn_goes_on(engine, when):
    whole, _ = ask(engine, user(ONCE), max_new_tokens=40)
    stop, text, last = threading.Event(), "", Chunk()
    for chunk in engine.stream(user(ONCE), Sampling(max_new_tokens=400), stop):
        text, last = text + chunk.text, chunk
        if chunk.tokens >= when:
            stop.set()
    assert last.finish_reason == "stopped"
    assert whole.startswith(text) or text.startswith(whole)
    assert last.tokens >= when
    assert ask(engine, user(ONCE), max_new_tokens=40)[0] == whole


@pytest.mark.parametrize("looks", [*range(8), 13, 21, 34, 55])
def test_a_stop_at_any_moment_leaves_the_engine_whole(engine, looks, monkeypatch):
    monkeypatch.setattr("nibble.engines.generation.PIECE_TOKENS", (16, 16))
    monkeypatch.setattr("nibble.engines.generation.TOKEN_S", 0)  # tokens are interrupted between layers too
    messages = user("One day, a bird " * 20)
    whole, _ = ask(engine, messages, max_new_tokens=8)
    engine._generator.forget()
    engine._generator._piece = 16
    text, last = ask(engine, messages, StopAt(looks), max_new_tokens=400)
    assert last.finish_reason == "stopped"
    assert ask(engine, messages, max_new_tokens=8)[0] == whole


def test_closing_the_iterator_stops_this_request_alone(engine):
    others = []
    other = threading.Thread(target=lambda: others.append(ask(engine, user("Tom"), max_new_tokens=50)))
    stream = engine.stream(user(ONCE), Sampling(max_new_tokens=500), threading.Event())
    next(stream)
    other.start()
    stream.close()
    other.join(30)
    assert others[0][1].finish_reason in ("length", "stop")


def test_a_conversation_reuses_what_was_read_and_equals_a_cold_run(engine):
    messages = user(ONCE)
    for turn in range(4):
        warm, last = ask(engine, messages, max_new_tokens=25)
        assert last.reused_tokens > 0 or turn == 0
        engine._generator.forget()
        cold, fresh = ask(engine, messages, max_new_tokens=25)
        assert warm == cold
        assert fresh.reused_tokens == 0
        messages = [*messages, {"role": "assistant", "content": warm}, *user("Then the dog")]
    edited = [*messages[:2], *user("But the cat")]
    warm, last = ask(engine, edited, max_new_tokens=25)
    assert 0 < last.reused_tokens < last.prompt_tokens
    engine._generator.forget()
    assert ask(engine, edited, max_new_tokens=25)[0] == warm


def test_an_equal_prompt_leaves_one_token_to_read(engine):
    ask(engine, user(ONCE), max_new_tokens=5)
    text, last = ask(engine, user(ONCE), max_new_tokens=5)
    assert last.reused_tokens == last.prompt_tokens - 1


@pytest.mark.parametrize("chunk", [16, 17, 64, 300])
def test_a_prompt_read_in_pieces_gives_the_same_text(engine, reference, chunk):
    prompt = "Once there was a girl. " * 30
    engine._generator.forget()
    engine._generator._piece = chunk
    text, last = ask(engine, user(prompt), max_new_tokens=20)
    assert last.reused_tokens == 0
    assert text == generated(reference, prompt, max_new_tokens=20, do_sample=False)


def test_the_answer_ends_where_the_context_does(engine):
    text, last = ask(engine, user("Once there was a girl. " * 40), max_new_tokens=4000)
    assert last.prompt_tokens + last.tokens <= 512
    assert last.finish_reason in ("length", "stop")


def test_old_turns_are_dropped_and_said_so(engine):
    old = [*user("Hi " * 60), {"role": "assistant", "content": "Ho " * 60}] * 3
    text, last = ask(engine, [*old, *user(ONCE)], max_new_tokens=10)
    assert last.dropped_turns >= 1
    assert last.prompt_tokens <= 502


def test_a_message_longer_than_the_context_is_told_in_numbers(engine):
    with pytest.raises(NibbleError, match=r"tokens with the system prompt, room for 511\."):
        ask(engine, user("word " * 2000))


@pytest.mark.parametrize("content", ["", " ", "\0", "\ud800"])
def test_an_empty_message_is_a_sentence(engine, content):
    with pytest.raises(NibbleError, match="The message is empty"):
        ask(engine, user(content))


def test_text_that_no_tokenizer_takes_is_answered(engine):
    assert (
        ask(engine, user("Once\0 upon \udfffa time"), max_new_tokens=20)[0]
        == ask(engine, user(ONCE), max_new_tokens=20)[0]
    )


def test_twenty_at_once_get_their_own_answers(engine):
    wanted = {name: ask(engine, user(f"{name} said"), max_new_tokens=30)[0] for name in map("Tom{}".format, range(20))}
    got: dict[str, tuple[str, Chunk]] = {}
    places: dict[str, list[int]] = {name: [] for name in wanted}

    def one(name: str) -> None:
        text = ""
        for chunk in engine.stream(user(f"{name} said"), Sampling(max_new_tokens=30), threading.Event(), name):
            text += chunk.text
            places[name].append(chunk.place)
        got[name] = (text, chunk)

    threads = [threading.Thread(target=one, args=(name,)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {name: text for name, (text, _) in got.items()} == wanted
    assert max(place for seen in places.values() for place in seen) > 1
    for seen in places.values():
        assert seen == sorted(seen, reverse=True)


def held(engine) -> tuple:
    """A request that is being answered, and the event that ends it."""
    stop = threading.Event()
    stream = engine.stream(user(ONCE), Sampling(max_new_tokens=480, temperature=1.0), stop)
    while next(stream).tokens == 0:
        pass
    return stream, stop


def test_a_waiting_request_that_is_stopped_leaves_at_once(engine):
    stream, stop = held(engine)
    own = threading.Event()
    waiting = engine.stream(user("Tom"), Sampling(), own)
    next(waiting)
    own.set()
    *_, last = waiting
    assert last.finish_reason == "stopped"
    assert last.tokens == 0
    stop.set()
    assert list(stream)[-1].finish_reason == "stopped"


class Broken(Exception):
    """Raised in the place of a model that fails."""


@pytest.fixture
def fragile(stories: Path) -> Iterator[tuple[LocalEngine, torch.nn.Module]]:
    """An engine, and its model to break."""
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(stories)
    info = EngineInfo("s", "fp32", "cpu", "float32", "", 512, "plain")
    engine = LocalEngine(model, tokenizer, choose_template(tokenizer, "llama"), info)
    yield engine, model
    engine.close()


def breaks_after(count: int, error: BaseException):
    """A hook that raises at the count-th step of the model."""

    def hook(*_):
        nonlocal count
        count -= 1
        if count < 0:
            raise error

    return hook


@pytest.mark.parametrize("step", [0, 1, 2, 5, 20])
def test_a_failure_inside_the_model_is_a_sentence_and_the_next_answer_comes(fragile, step, caplog):
    engine, model = fragile
    good, _ = ask(engine, user(ONCE), max_new_tokens=30)
    hook = model.register_forward_pre_hook(breaks_after(step, Broken("secret path")))
    with pytest.raises(NibbleError, match=r"failed inside the model \(Broken\)") as caught:
        ask(engine, user(ONCE), max_new_tokens=30)
    hook.remove()
    assert "secret" not in str(caught.value)
    assert "secret path" in caplog.text
    assert caught.value.hint.split()[-1].rstrip(".") in caplog.text
    assert ask(engine, user(ONCE), max_new_tokens=30)[0] == good


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["torch", "python", "cpu allocator"],
)
def test_out_of_memory_is_told_with_what_to_do(fragile, error):
    engine, model = fragile
    hook = model.register_forward_pre_hook(breaks_after(3, error))
    with pytest.raises(DeviceError, match="ran out of memory") as caught:
        ask(engine, user(ONCE))
    hook.remove()
    assert "fewer bits" in caught.value.hint
    assert ask(engine, user(ONCE), max_new_tokens=3)[1].tokens == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_numbers_that_are_not_finite_are_a_sentence(fragile, value, temperature):
    engine, model = fragile
    with torch.no_grad():
        model.model.norm.weight[0] = value
    with pytest.raises(ModelError, match="not finite"):
        ask(engine, user(ONCE), temperature=temperature)


def test_closing_ends_the_answer_and_turns_the_others_away(fragile):
    engine, _ = fragile
    stream, _ = held(engine)
    waiting = engine.stream(user("Tom"), Sampling(), threading.Event())
    next(waiting)
    engine.close()
    engine.close()
    assert list(stream)[-1].finish_reason == "stopped"
    with pytest.raises(NibbleError, match="unloaded"):
        list(waiting)
    with pytest.raises(NibbleError, match="unloaded"):
        next(engine.stream(user("Tom"), Sampling(), threading.Event()))
    assert not any(thread.name == "nibble-engine" and thread is engine._thread for thread in threading.enumerate())


def test_speed_and_first_token_are_measured_in_its_own_turn(engine):
    start = time.perf_counter()
    _, last = ask(engine, user(ONCE), max_new_tokens=30)
    assert 0 < last.first_token_s < time.perf_counter() - start
    assert last.tokens_per_s > 1 / (time.perf_counter() - start)


def variant(stories: Path, folder: Path, config: dict | None = None, tokenizer: dict | None = None) -> Path:
    """A copy of the model with its JSON files changed."""
    folder.mkdir()
    for path in stories.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name, change in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **(change or {})}))
    return folder


def test_a_low_bit_folder_is_loaded_as_it_is(stories, tmp_path):
    from nibble.transformers import AutoModelForCausalLM as LowBit

    LowBit.from_pretrained(stories, load_in_low_bit="asym_int5", dtype="float32").save_low_bit(tmp_path / "small")
    quantized = LocalEngine.load(stories, "asym_int5", dtype="float32")
    saved = LocalEngine.load(tmp_path / "small", "sym_int4", dtype="float32")
    assert saved.info.format == quantized.info.format == "asym_int5"
    assert ask(saved, user(ONCE), max_new_tokens=30)[0] == ask(quantized, user(ONCE), max_new_tokens=30)[0]
    saved.close()
    quantized.close()


def test_the_model_is_described(engine):
    info = engine.info
    assert (info.model, info.format, info.device, info.dtype) == ("stories260K-hf", "fp32", "cpu", "float32")
    assert (info.context, info.family, info.template, info.parameters) == (512, "llama", "plain", 260_032)
    assert info.memory_bytes > 10**7
    assert info.load_s > 0 and info.warmup_s > 0


def test_the_generation_config_of_the_model_is_what_nobody_overrides(stories, tmp_path, reference):
    folder = variant(stories, tmp_path / "m")
    options = {"do_sample": True, "temperature": 0.6, "top_k": 9, "max_new_tokens": 17, "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, **options}))
    engine = LocalEngine.load(folder, "", dtype="float32")
    text, last = ask(engine, user(ONCE), seed=5)
    torch.manual_seed(5)
    assert text == generated(
        reference, ONCE, generation_config=GenerationConfig(eos_token_id=2, pad_token_id=0, **options)
    )
    assert last.tokens == 17
    engine.close()


def test_an_opened_thought_is_shown_as_one(stories, tmp_path):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
    engine = LocalEngine.load(
        variant(stories, tmp_path / "m", tokenizer={"chat_template": template}), "", dtype="float32"
    )
    assert engine.info.template == "tokenizer"
    assert ask(engine, user(ONCE), max_new_tokens=3)[0].startswith("<think>\n")
    engine.close()


def test_a_template_that_fails_is_said_in_the_description(stories, tmp_path):
    folder = variant(stories, tmp_path / "m", tokenizer={"chat_template": "{{ nobody.knows }}"})
    engine = LocalEngine.load(folder, "", dtype="float32")
    assert engine.info.template == "plain"
    assert "chat template cannot be used" in engine.info.note
    assert ask(engine, user(ONCE), max_new_tokens=3)[1].tokens == 3
    engine.close()


@pytest.mark.parametrize("window", [8, 40])
def test_a_model_with_a_sliding_window_equals_generate(stories, tmp_path, window):
    folder = variant(
        stories,
        tmp_path / "m",
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window},
    )
    engine = LocalEngine.load(folder, "", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt in (ONCE, "One day, a bird sang. " * 12):
        for _ in range(2):
            engine._generator._piece = 16
            text, last = ask(engine, user(prompt), max_new_tokens=30)
            assert text == generated((model, tokenizer), prompt, max_new_tokens=30, do_sample=False)
            assert last.reused_tokens == 0
    engine.close()


def test_faults_of_a_folder_are_sentences(stories, tmp_path):
    with pytest.raises(FormatError, match="int4"):
        LocalEngine.load(stories, "int4")
    with pytest.raises(DeviceError):
        LocalEngine.load(stories, device="xpu")
    with pytest.raises(ModelError, match="nowhere"):
        LocalEngine.load(tmp_path / "nowhere")
    unknown = variant(stories, tmp_path / "unknown", {"model_type": "brontosaurus", "architectures": ["Bronto"]})
    with pytest.raises(ModelError, match="unknown could not be loaded"):
        LocalEngine.load(unknown)


def test_a_tokenizer_with_tokens_that_the_model_lacks_is_a_sentence(stories, tmp_path):
    folder = variant(stories, tmp_path / "m", {"vocab_size": 300})
    tensors = load_file(folder / "model.safetensors")
    small = {name: tensor[:300].clone() if tensor.shape[0] == 512 else tensor for name, tensor in tensors.items()}
    save_file(small, folder / "model.safetensors", metadata={"format": "pt"})
    try:
        engine = LocalEngine.load(folder, "", dtype="float32")
    except ModelError as error:
        assert "does not know" in str(error)
    else:
        with pytest.raises(ModelError, match="does not know"):
            ask(engine, user("the zebra's quiz"))
        engine.close()


def test_a_slow_model_that_still_moves_gives_signs_of_life(fragile, monkeypatch):
    engine, model = fragile
    monkeypatch.setattr("nibble.engines.local.ALIVE_S", 0.01)
    slow = [layer.register_forward_pre_hook(lambda *_: time.sleep(0.02)) for layer in model.model.layers]
    chunks = []
    engine.submit(Request(user(ONCE), Sampling(max_new_tokens=2)), chunks.append)
    while not chunks or chunks[-1].finish_reason is None:
        time.sleep(0.01)
    assert len([chunk for chunk in chunks if not chunk.tokens]) >= len(slow)
