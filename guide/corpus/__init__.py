"""The guide's training text: hand-written YAML, and the generators that vary it.

Promises: the same seed gives the same conversations; an answer is always one of the written answers, verbatim.
Knows nothing of tokens, tensors or the examination.
"""

from guide.corpus.conversations import Conversation, Generator
from guide.corpus.load import LANGUAGES, Corpus, Topic, is_held_out, load_corpus, normalise

__all__ = ["LANGUAGES", "Conversation", "Corpus", "Generator", "Topic", "is_held_out", "load_corpus", "normalise"]
