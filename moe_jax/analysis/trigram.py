"""The floor of a claim that experts know domains: how well the last three bytes alone tell the domain.

A router that has learnt nothing but letters sees three bytes and can tell Python from prose by them. What its experts say about the
domain says something about the model only where it is more than `TrigramClassifier.score` says. At each byte the classifier gives
p(domain | this byte and the two before), one place at a time, adding nothing up over the document.

`trigram_experts.py` has the figure of a router to hold against it, and says how far the two can be compared.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from moe_jax.config import ConfigError
from moe_jax.data.tokenized import Split
from moe_jax.data.tokenizers import Tokenizer

BEFORE = 256  # stands for the bytes before a document's first
BASE = 257
ORDERS = (1, 2, 3)  # bytes of context, the shortest first


@dataclass(frozen=True)
class TrigramScore:
    """How well a place tells its domain; each domain counts the same, whatever its bytes.

    Attributes:
      accuracy: part of the places whose most probable domain is theirs, mean over domains.
      majority: 1 / X, the accuracy of one who knows nothing.
      information_bits: `entropy_bits` less the mean of -log2 of the probability given to the true domain. As the classifier knows
        nothing of the texts it is scored on, it is, but for chance, no more than I(domain; last three bytes). Below 0 for a classifier
        that is surer than it is right.
      entropy_bits: log2 X.
      accuracy_X: by domain, in the order of the classifier's domains.
    """

    accuracy: float
    majority: float
    information_bits: float
    entropy_bits: float
    accuracy_X: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class TrigramClassifier:
    """p(domain | last three bytes), every domain as likely as every other beforehand. Made by `train`.

    Attributes:
      domains: names, the order of X.
      tables: of the last byte, the last two and the last three: (their codes, ascending [n]; probabilities [n, X] float64).
    """

    domains: tuple[str, ...]
    tables: tuple[tuple[np.ndarray, np.ndarray], ...]

    def posterior(self, text: bytes) -> np.ndarray:
        """p(domain) at each byte of a document's beginning `text`, float64 [bytes, X]: that of the longest of its contexts seen."""
        code_T = _codes(text)
        probability_TX = np.full((len(code_T), len(self.domains)), 1 / len(self.domains))
        for order, (codes, probability_GX) in zip(ORDERS, self.tables, strict=True):
            suffix_T = code_T % BASE**order
            place_T = np.minimum(np.searchsorted(codes, suffix_T), len(codes) - 1)
            known_T = codes[place_T] == suffix_T
            probability_TX[known_T] = probability_GX[place_T[known_T]]
        return probability_TX

    def score(self, texts_by_domain: Mapping[str, Iterable[bytes]]) -> TrigramScore:
        """How well it does on other documents than those it was trained on.

        Args:
          texts_by_domain: bytes of documents, for every domain of the classifier.

        Raises:
          ConfigError: a domain of the classifier has no bytes, or another domain has.
        """
        if set(texts_by_domain) != set(self.domains):
            raise ConfigError(
                f"the texts are of {', '.join(texts_by_domain) or 'no domain'} and the classifier knows {', '.join(self.domains)};"
                " give texts of these."
            )
        right_X, surprise_X = [], []
        for x, domain in enumerate(self.domains):
            places, right, surprise = 0, 0, 0.0
            for text in texts_by_domain[domain]:
                posterior_TX = self.posterior(text)
                places, right = places + len(posterior_TX), right + int((posterior_TX.argmax(1) == x).sum())
                surprise -= float(np.log2(posterior_TX[:, x]).sum())
            if not places:
                raise ConfigError(f"domain {domain!r} has no text to score; train and score without it.")
            right_X.append(right / places)
            surprise_X.append(surprise / places)
        X, entropy_bits = len(self.domains), float(np.log2(len(self.domains)))
        return TrigramScore(
            float(np.mean(right_X)), 1 / X, entropy_bits - float(np.mean(surprise_X)), entropy_bits, tuple(right_X)
        )


def train(
    texts_by_domain: Mapping[str, Iterable[bytes]], max_bytes: int = 4_000_000, smoothing: float = 8.0
) -> TrigramClassifier:
    """Counts the trigrams of each domain.

    With r(x, g) how often context g came in domain x, scaled so that all domains have equally many bytes, and c the constant:

        p(x | abc) = (r(x, abc) + c p(x | bc)) / (sum_x r(x, abc) + c),    p(x | bc) from p(x | c) alike, p(x | c) from 1 / X

    that is, add-constant smoothing whose constant is shared out as the next shorter context says (Dirichlet smoothing; MacKay and
    Peto 1995, A hierarchical Dirichlet language model).

    Args:
      texts_by_domain: bytes of training documents.
      max_bytes: of each domain, the first ones.
      smoothing: c > 0, in bytes. Between 4 and 32 it hardly matters on a megabyte of text; less is too sure of what one document says.

    Raises:
      ConfigError: no domain, a domain without text, or nothing to smooth with.
    """
    if smoothing <= 0:
        raise ConfigError(f"smoothing = {smoothing} gives domains the probability 0; use more than 0.")
    if not texts_by_domain:
        raise ConfigError("there is no domain to train on; give texts of at least one.")
    domains, counted = tuple(texts_by_domain), []
    for domain in domains:
        codes = [_codes(text) for text in _first(texts_by_domain[domain], max_bytes)]
        if not sum(map(len, codes)):
            raise ConfigError(f"domain {domain!r} has no text to train on; leave it out.")
        counted.append(np.unique(np.concatenate(codes), return_counts=True))
    mean = np.mean([counts.sum() for _, counts in counted])
    code_G = np.unique(np.concatenate([codes for codes, _ in counted]))
    rate_GX = np.zeros((len(code_G), len(domains)))
    for x, (codes, counts) in enumerate(counted):
        rate_GX[np.searchsorted(code_G, codes), x] = counts * (mean / counts.sum())
    tables, prior = [], (np.zeros(1, np.int64), np.full((1, len(domains)), 1 / len(domains)))
    for order in ORDERS:
        prior = _table(code_G % BASE**order, rate_GX, prior, BASE ** (order - 1), smoothing)
        tables.append(prior)
    return TrigramClassifier(domains, tuple(tables))


def texts_of(split: Split, tokenizer: Tokenizer, domain: str, max_bytes: int, seed: int = 0) -> Iterator[bytes]:
    """Bytes of documents of a domain, in a random order, up to `max_bytes` together; the last may be cut.

    Args:
      split: training or validation.
      tokenizer: that made its tokens.
      domain: its name.
      max_bytes: of all documents yielded.
      seed: of the order.

    Raises:
      DataError: the domain has no documents in the split.
    """
    room = max_bytes
    for document in np.random.default_rng(seed).permutation(split.documents_of(domain)):
        if room <= 0:
            return
        begin, end = (int(split.offsets[document + i]) for i in range(2))
        end = min(end, begin + 1 + room + 4)  # 4 more, as a cut may fall within a character
        text = tokenizer.decode(np.asarray(split.tokens[begin + 1 : end]).tolist()).encode()[:room]  # after eot
        room -= len(text)
        yield text


def _codes(text):
    """Of each place the byte there and the two before as one number, int64 [bytes]: the last byte counts least."""
    byte_T = np.concatenate([np.full(2, BEFORE), np.frombuffer(text, np.uint8)]).astype(np.int64)
    return (byte_T[:-2] * BASE + byte_T[1:-1]) * BASE + byte_T[2:]


def _first(texts, max_bytes):
    for text in texts:
        if max_bytes <= 0:
            return
        yield text[:max_bytes]
        max_bytes -= len(text)


def _table(code_G, rate_GX, prior, base, smoothing):
    """(codes, probabilities) of contexts whose next shorter ones, their codes modulo `base`, have those of `prior`."""
    codes, place_G = np.unique(code_G, return_inverse=True)
    sum_CX = np.zeros((len(codes), rate_GX.shape[1]))
    np.add.at(sum_CX, place_G, rate_GX)
    shorter, prior_CX = prior
    expected_CX = prior_CX[np.searchsorted(shorter, codes % base)]
    return codes, (sum_CX + smoothing * expected_CX) / (sum_CX.sum(1, keepdims=True) + smoothing)
