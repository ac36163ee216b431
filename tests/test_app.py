"""The page as a script sees it: endpoints, guard, streams, sessions. The host behind it is scripted."""

import errno
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from app import build_app, listen, main
from nibble.config import Settings
from nibble.doorstep import COOKIE, TOKEN
from nibble.errors import NibbleError
from tests.scripted import ScriptedHost
from tests.serving import free_port, page

ROOT = Path(__file__).parents[1]
ENDPOINTS = {"/chat", "/bot_response", "/stop", "/new_chat", "/models"}
OPERATOR = {
    "/load", "/unload", "/delete_model", "/estimates", "/report",
    "/download", "/quantize", "/evaluate", "/jobs", "/job_log", "/stop_job", "/resume_job",
    "/finetune", "/dry_run", "/preview_data", "/merge", "/compare", "/compare_report",
}  # fmt: skip


@pytest.fixture(scope="module")
def host() -> ScriptedHost:
    return ScriptedHost()


@pytest.fixture(scope="module")
def url(host: ScriptedHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("home")
    with page(home, host) as address:
        yield address


@pytest.fixture(scope="module")
def session(url: str) -> Iterator[Client]:
    made = Client(url, verbose=False)
    yield made
    made.close()


@pytest.fixture
def client(session: Client) -> Client:
    """A session in which nothing was said yet."""
    session.predict(api_name="/new_chat")
    return session


def names(client: Client) -> set[str]:
    return set(client.view_api(return_format="dict", print_info=False)["named_endpoints"])


def test_exactly_the_promised_endpoints_are_public(client: Client) -> None:
    assert names(client) == ENDPOINTS | OPERATOR


def test_public_mode_registers_nothing_that_loads_models(tmp_path: Path) -> None:
    built = build_app(Settings(public=True, home=str(tmp_path)), ScriptedHost())
    registered = {str(fn.api_name) for fn in built.fns.values()}
    assert not {f"/{name}" for name in registered} & OPERATOR
    assert {f"/{name}" for name in registered} >= ENDPOINTS
    labels = json.dumps(built.get_config_file()["components"], default=str)
    assert '"model-drawer"' not in labels
    assert '"models-page"' not in labels
    assert '"model-drawer"' in json.dumps(
        build_app(Settings(home=str(tmp_path)), ScriptedHost()).get_config_file()["components"], default=str
    )


@pytest.mark.parametrize("endpoint", ["/chat", "/bot_response"])
def test_the_answer_arrives_in_growing_parts(client: Client, endpoint: str) -> None:
    parts = list(client.submit("hello", api_name=endpoint))
    assert len(parts) >= 5
    assert all(later.startswith(earlier) and later != earlier for earlier, later in zip(parts, parts[1:], strict=False))
    assert parts[-1].startswith("You said: hello")


def test_the_history_is_the_session_s_and_new_chat_forgets_it(client: Client, host: ScriptedHost) -> None:
    client.predict("first", api_name="/chat")
    client.predict("second", api_name="/chat")
    assert [turn["role"] for turn in host.asked[-1]] == ["user", "assistant", "user"]
    client.predict(api_name="/new_chat")
    client.predict("third", api_name="/chat")
    assert [turn["content"] for turn in host.asked[-1]] == ["third"]


def test_sampling_and_system_prompt_reach_the_engine(client: Client, host: ScriptedHost) -> None:
    client.predict("hello", 7, 0.5, 0.9, 40, 1.1, 3, "Be brief.", api_name="/chat")
    sampling = host.samplings[-1]
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (7, 0.5, 0.9, 40)
    assert (sampling.repetition_penalty, sampling.seed) == (1.1, 3)
    assert host.asked[-1][0] == {"role": "system", "content": "Be brief."}
    client.predict("again", api_name="/chat")
    assert host.asked[-1][0]["content"] == "Be brief."
    assert host.samplings[-1].temperature is None


def test_no_answer_is_longer_than_the_owner_allows(tmp_path: Path) -> None:
    host = ScriptedHost()
    with page(tmp_path, host, max_new_tokens_limit=100) as address:
        Client(address, verbose=False).predict("hello", 30_000, api_name="/chat")
    assert host.samplings[-1].max_new_tokens == 100


def test_stop_ends_a_long_answer_and_keeps_its_text(client: Client, host: ScriptedHost) -> None:
    job = client.submit("endless", api_name="/chat")
    while len(job.outputs()) < 5:
        time.sleep(0.01)
    assert client.predict(api_name="/stop") is True
    text = job.result(timeout=10)
    assert text.startswith("0 1 2 3 ")
    assert "4999" not in text
    client.predict("hello", api_name="/chat")
    assert host.asked[-1][1]["content"] == text
    assert client.predict(api_name="/stop") is False


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (("",), "empty"),
        (("   \n",), "empty"),
        ((7,), "must be text"),
        (({"role": "system"},), "must be text"),
        (("x" * 200_001,), "200,000"),
        (("hello", "many"), "not a number"),
        (("hello", True), "not a number"),
        (("hello", 2.5), "not a number"),
        (("hello", 8, 99.0), "temperature"),
        (("hello", 0), "max_new_tokens"),
        (("hello", 8, None, None, None, None, None, 12), "must be text"),
        (("die",), "starts it again"),
        (("fail",), "failed inside the model"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_refusal_is_one_sentence(client: Client, call: tuple, sentence: str) -> None:
    with pytest.raises(AppError, match=sentence) as caught:
        client.predict(*call, api_name="/chat")
    assert "Traceback" not in str(caught.value)
    assert client.predict("hello", api_name="/chat").startswith("You said")


def test_what_nobody_foresaw_shows_an_id_and_no_detail(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(AppError) as caught:
        client.predict("crash", api_name="/chat")
    number = str(caught.value).rpartition("id ")[2].rstrip(".")
    assert "secret" not in str(caught.value)
    assert number in caplog.text


def test_twenty_sessions_at_once_get_their_own_answers(url: str) -> None:
    answers: dict[int, list[str]] = {}

    def talk(number: int) -> None:
        client = Client(url, verbose=False)
        answers[number] = [client.predict(f"marker{number} turn{turn}", api_name="/chat") for turn in range(2)]

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, said in answers.items():
        assert [f"marker{number} turn{turn} " in text for turn, text in enumerate(said)] == [True] * 2
        assert not any(f"marker{other} " in text for text in said for other in range(20) if other != number)


def test_one_conversation_has_one_answer_in_writing(client: Client) -> None:
    job = client.submit("endless", api_name="/chat")
    while not job.outputs():
        time.sleep(0.01)
    with pytest.raises(AppError, match="still being written"):
        client.predict("hello", api_name="/chat")
    client.predict(api_name="/stop")
    job.result(timeout=10)


def test_a_full_server_says_so(tmp_path: Path) -> None:
    with page(tmp_path, queue_size=2) as address:
        jobs = [Client(address, verbose=False).submit("endless", api_name="/chat") for _ in range(2)]
        while not all(job.outputs() for job in jobs):
            time.sleep(0.01)
        with pytest.raises(AppError, match="full"):
            Client(address, verbose=False).predict("hello", api_name="/chat")
        for job in jobs:
            job.cancel()


def test_models_are_loaded_by_name_and_never_by_path(client: Client, host: ScriptedHost, tmp_path: Path) -> None:
    assert "nf4" in client.predict("guide", "nf4", api_name="/load")
    assert host.info is not None and host.info.format == "nf4"
    for name in (str(tmp_path), "../guide", "/etc", "", ".", "guide/model"):
        with pytest.raises(AppError, match="no model"):
            client.predict(name, api_name="/load")
    assert str(tmp_path) not in json.dumps(client.predict(api_name="/models"))
    client.predict(api_name="/unload")
    with pytest.raises(AppError, match="No model is loaded"):
        client.predict("hello", api_name="/chat")
    client.predict("guide", api_name="/load")


def test_a_closed_client_ends_its_answer(url: str, host: ScriptedHost) -> None:
    client = Client(url, verbose=False)
    job = client.submit("endless", api_name="/chat")
    while not job.outputs():
        time.sleep(0.01)
    job.cancel()
    deadline = time.monotonic() + 10
    while host.waiting and time.monotonic() < deadline:
        time.sleep(0.05)
    assert host.waiting == 0


# The guard, the cookie, the headers.


def test_foreign_origins_and_hosts_are_refused_by_the_whole_server(url: str) -> None:
    join = f"{url}/gradio_api/queue/join"
    for headers in ({"origin": "https://evil.example"}, {"origin": "null"}, {"host": "evil.example"}):
        for address in (join, f"{url}/gradio_api/upload", f"{url}/login"):
            reply = httpx.post(address, headers=headers, json={})
            assert reply.status_code == 403, address
            assert "access-control-allow-origin" not in reply.headers
    preflight = httpx.options(join, headers={"origin": "https://evil.example", "access-control-request-method": "POST"})
    assert preflight.status_code == 403
    assert httpx.post(join, headers={"origin": url}, json={}).status_code != 403


def test_a_browser_vouches_for_its_own_page_behind_a_proxy_that_rewrites_host(url: str) -> None:
    headers = {"origin": "https://hub.example", "sec-fetch-site": "same-origin"}
    assert httpx.post(f"{url}/health", headers=headers).status_code == 200
    assert httpx.post(f"{url}/health", headers=headers | {"sec-fetch-site": "cross-site"}).status_code == 403
    assert httpx.post(f"{url}/health", headers=headers | {"host": "evil.example"}).status_code == 403


def test_nothing_is_served_beside_the_page(url: str) -> None:
    for path in ("/gradio_api/openapi.json", "/openapi.json", "/docs", "/monitoring", "/gradio_api/runs"):
        assert httpx.get(url + path).status_code == 404, path
    for path in ("/etc/passwd", str(ROOT / "config.yaml"), "config.yaml"):
        assert httpx.get(f"{url}/gradio_api/file={path}").status_code in (403, 404), path


def test_every_reply_is_dressed_and_the_configuration_is_closed(url: str) -> None:
    reply = httpx.get(url)
    assert "connect-src 'self'" in reply.headers["content-security-policy"]
    assert reply.headers["x-content-type-options"] == "nosniff"
    config = httpx.get(f"{url}/config").json()
    assert (config["show_error"], config["footer_links"], config["analytics_enabled"]) == (False, [], False)


@pytest.mark.parametrize("name", ["x-forwarded-host", "x-gradio-server"])
def test_a_forged_header_does_not_move_the_page(url: str, name: str) -> None:
    reply = httpx.get(f"{url}/config", headers={name: "http://evil.example"})
    assert "evil.example" not in reply.text


def test_a_visitor_gets_one_cookie_that_no_script_can_read(url: str) -> None:
    first = httpx.get(url)
    line = first.headers["set-cookie"]
    assert "HttpOnly" in line and "SameSite=Lax" in line and "Path" not in line
    assert TOKEN.fullmatch(first.cookies[COOKIE])
    assert "set-cookie" not in httpx.get(url, cookies={COOKIE: first.cookies[COOKIE]}).headers
    assert "set-cookie" in httpx.get(url, cookies={COOKIE: "../../etc"}).headers
    assert "Secure" in httpx.get(url, headers={"x-forwarded-proto": "https"}).headers["set-cookie"]
    assert "set-cookie" not in httpx.get(f"{url}/config").headers


def test_a_password_closes_page_and_endpoints(tmp_path: Path) -> None:
    with page(tmp_path, auth="me:secret") as address:
        assert httpx.get(f"{address}/config").status_code == 401
        assert httpx.post(f"{address}/gradio_api/queue/join", json={}).status_code == 401
        assert httpx.post(f"{address}/login", data={"username": "me", "password": "no"}).status_code == 400
        client = Client(address, auth=("me", "secret"), verbose=False)
        assert client.predict("hello", api_name="/chat").startswith("You said")


# The command line.


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(NibbleError, match=str(port)):
            listen(Settings(port=port))


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(NibbleError, match="Cannot listen") as caught:
        listen(Settings(host="192.0.2.1", port=free_port()))
    assert caught.value.exit_code == 1
    assert errno.errorcode  # the reason is in words, never a number
    assert "Errno" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--host", "0.0.0.0"], 2, "without a password"),
        (["--port", "70000"], 2, "port"),
        (["--config", "/nowhere.yaml"], 2, "nowhere.yaml"),
        (["--root-path", "ftp://x"], 2, "root_path"),
        (["--model", "no-such-model"], 1, "no-such-model"),
        (["--low-bit", "sym_int3"], 1, "sym_int"),
    ],
)
def test_a_bad_start_is_one_line_and_an_exit_code(
    flags: list[str], code: int, said: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("nibble: ")
    assert said in " ".join(lines)
    assert len(lines) <= 2


def test_the_page_opens_without_torch_and_answers_without_it(stories: Path, tmp_path: Path) -> None:
    """The real server, the real worker, a real model: the page's process never maps torch, and Ctrl+C ends both."""
    port = free_port()
    command = [sys.executable, "app.py", "--port", str(port), "--home", str(tmp_path), "--model", str(stories)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == f"Nibble is ready at http://127.0.0.1:{port}/"
        try:
            parts = list(Client(f"http://127.0.0.1:{port}", verbose=False).submit("Once", 32, api_name="/chat"))
            children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            mapped = Path(f"/proc/{process.pid}/maps").read_text()
            assert len(parts) >= 5
            assert "torch" not in mapped
            assert children
        finally:
            process.send_signal(2)
            process.wait(15)
        assert "Traceback" not in process.stdout.read()
        assert not [child for child in children if Path(f"/proc/{child}/maps").exists()]
