"""The last three bytes, and a token's experts, as witnesses of the domain: languages and routings whose best accuracy is known."""

import itertools

import numpy as np
import pytest
from specialisation_cases import distinct, observe

from moe_jax.analysis.trigram import texts_of, train
from moe_jax.analysis.trigram_experts import expert_classifier
from moe_jax.config import ConfigError
from moe_jax.data import tokenizers
from moe_jax.data.documents import DataError, Document
from moe_jax.data.tokenized import encode
from moe_jax.train.observation import ObservationError

LETTERS = np.frombuffer(b"abcd", np.uint8)


def random_text(rng, share, length):
    return LETTERS[rng.choice(4, length, p=share)].tobytes()


def best(p_XO):
    """(accuracy, bits) of the best guess of x, all x alike beforehand, from an outcome of probabilities p_XO."""
    mean_O = p_XO.mean(0)
    return p_XO.max(0).sum() / len(p_XO), np.sum(p_XO * np.log2(p_XO / mean_O)) / len(p_XO)


def test_letters_drawn_from_known_shares():
    """The best accuracy and all the information that three letters have are reached, however long the texts of each."""
    rng, share_XV = np.random.default_rng(0), np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.25] * 4])
    trigrams = [
        list(share_V[list(letters)].prod() for letters in itertools.product(range(4), repeat=3)) for share_V in share_XV
    ]
    accuracy, bits = best(np.array(trigrams))
    texts = {name: [random_text(rng, share_V, 60000)] for name, share_V in zip("abc", share_XV, strict=True)}
    texts["a"].append(random_text(rng, share_XV[0], 200000))  # more text must not make a domain likelier
    score = train(texts, smoothing=1.0).score(
        {
            name: [random_text(rng, share_V, length)]
            for name, share_V, length in zip("abc", share_XV, (60000, 20000, 20000), strict=True)
        }
    )
    assert score.accuracy == pytest.approx(accuracy, abs=0.01)
    assert score.information_bits == pytest.approx(bits, abs=0.02)
    assert score.majority == pytest.approx(1 / 3)
    assert score.entropy_bits == pytest.approx(np.log2(3))
    assert score.accuracy == pytest.approx(np.mean(score.accuracy_X))


def test_three_bytes_and_no_more():
    """One language is random; the other repeats the letter of 3 places before (a fourth byte), or of 2 places before (the third)."""
    rng = np.random.default_rng(1)

    def repeating(distance, length=40000):
        letters = rng.integers(0, 4, length)
        for i in range(distance, length):
            letters[i] = letters[i - distance] if rng.random() < 0.9 else letters[i]
        return LETTERS[letters].tobytes()

    scores = []
    for distance in (2, 3):
        sides = [{"random": [random_text(rng, [0.25] * 4, 40000)], "repeating": [repeating(distance)]} for _ in range(2)]
        scores.append(train(sides[0]).score(sides[1]))
    again = 0.9 + 0.1 / 4  # of the third byte of the last being the first
    accuracy, bits = best(np.array([[1 / 4, 3 / 4], [again, 1 - again]]))
    assert scores[0].accuracy == pytest.approx(accuracy, abs=0.01)
    assert scores[0].information_bits == pytest.approx(bits, abs=0.02)
    assert scores[1].accuracy == pytest.approx(0.5, abs=0.02)
    assert scores[1].information_bits == pytest.approx(0, abs=0.01)


def test_alphabets_tell_all_and_like_languages_nothing():
    rng = np.random.default_rng(2)
    apart = {"small": [random_text(rng, [0.25] * 4, 5000)], "large": [random_text(rng, [0.25] * 4, 5000).upper()]}
    score = train(apart).score(apart)
    assert score.accuracy == 1
    assert score.information_bits == pytest.approx(1, abs=0.01)
    alike = [{name: [random_text(rng, [0.25] * 4, 30000)] for name in "ab"} for _ in range(2)]
    score = train(alike[0]).score(alike[1])
    assert score.accuracy == pytest.approx(0.5, abs=0.02)
    assert -0.01 < score.information_bits < 0.005


def test_probabilities_by_hand():
    """Trained on "ab" and "cb" with c = 1. After "a" domain 0 is likelier, after "b" alone neither is, after "ab" 0 is again."""
    model = train({"zero": [b"ab"], "one": [b"cb"]}, smoothing=1.0)
    after_a1 = (1 + 1 / 2) / 2  # of the last byte: once in domain 0, never in 1
    after_a2 = (1 + after_a1) / 2  # nothing, "a"
    after_a3 = (1 + after_a2) / 2  # nothing, nothing, "a": as the document begins
    after_b1 = (1 + 1 / 2) / 3
    after_b2 = (1 + after_b1) / 2
    after_b3 = (1 + after_b2) / 2
    assert model.posterior(b"ab")[:, 0] == pytest.approx([after_a3, after_b3])
    assert model.posterior(b"cb")[:, 0] == pytest.approx([1 - after_a3, 1 - after_b3])
    # "x" was never seen; after it "a" is known as a letter only, "ab" as a pair, "?b" as a letter
    assert model.posterior(b"xabxb")[:, 0] == pytest.approx([1 / 2, after_a1, after_b2, 1 / 2, after_b1])
    assert model.posterior(b"\0\0a")[2, 0] == pytest.approx(after_a1)  # a document's beginning is no byte
    assert model.posterior(b"xab").sum(1) == pytest.approx(1)
    assert model.posterior(b"").shape == (0, 2)


def test_training_stops_at_its_bytes():
    model = train({"zero": [b"aaa", b"bbb"], "one": [b"c" * 9]}, max_bytes=5)
    full = train({"zero": [b"aaa", b"bb"], "one": [b"c" * 5]})
    assert model.posterior(b"aabbc") == pytest.approx(full.posterior(b"aabbc"))


@pytest.mark.parametrize(
    ("texts", "more", "says"),
    [
        ({}, {}, "no domain"),
        ({"a": [b"x"], "b": [b""]}, {}, "'b' has no text to train on"),
        ({"a": [b"x"], "b": []}, {}, "'b' has no text to train on"),
        ({"a": [b"x"]}, {"smoothing": 0.0}, "smoothing = 0.0"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(texts, more, says):
    with pytest.raises(ConfigError, match=says):
        train(texts, **more)


def test_what_cannot_be_scored_is_refused():
    model = train({"a": [b"x"], "b": [b"y"]})
    for texts, says in (({"a": [b"x"]}, "are of a and"), ({"a": [b"x"], "b": []}, "'b' has no text to score")):
        with pytest.raises(ConfigError, match=says):
            model.score(texts)


TEXTS = ["naïve: 日本語のテキスト, と", "plain\n", "été " * 9, "日本"]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_bytes_of_documents_are_those_of_their_texts(kind):
    tokenizer = tokenizers.Bytes() if kind == "bytes" else tokenizers.train_bpe(TEXTS * 3, 280)
    documents = [Document(("x", "y")[i == 1], str(i), text) for i, text in enumerate(TEXTS)]
    split = encode(documents, ("x", "y", "z"), tokenizer)
    mine = [text.encode() for i, text in enumerate(TEXTS) if i != 1]
    assert sorted(texts_of(split, tokenizer, "x", 10**6)) == sorted(mine)
    assert list(texts_of(split, tokenizer, "y", 10**6)) == [b"plain\n"]
    whole = list(texts_of(split, tokenizer, "x", 10**6, seed=3))
    for room in range(1, sum(map(len, mine)) + 2):
        got = list(texts_of(split, tokenizer, "x", room, seed=3))
        assert b"".join(got) == b"".join(whole)[:room], room
        assert all(text == document[: len(text)] for text, document in zip(got, whole, strict=False))
    assert len({tuple(texts_of(split, tokenizer, "x", 10**6, seed)) for seed in range(20)}) > 1
    with pytest.raises(DataError, match="'z' has no documents"):
        next(texts_of(split, tokenizer, "z", 9))


def routed(rng, share_XLE, tokens_X, choices=1, **more):
    """Tokens of each domain whose experts are drawn from its shares, layer by layer."""
    choice = [
        np.stack([distinct(rng, np.tile(share_E, (tokens, 1)), choices) for share_E in share_LE], axis=1)
        for share_LE, tokens in zip(share_XLE, tokens_X, strict=True)
    ]
    return observe(np.concatenate(choice), np.repeat(np.arange(len(tokens_X)), tokens_X), experts=share_XLE.shape[-1], **more)


def test_experts_drawn_from_known_shares():
    """One expert a token: what is found is what one expert and two can tell; a domain of more tokens counts no more."""
    rng = np.random.default_rng(3)
    share_XLE = np.array([[[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]], [[0.2, 0.3, 0.5], [0.1, 0.5, 0.4]]])
    found = expert_classifier(routed(rng, share_XLE, [16000, 8000]))
    for layer in range(2):
        accuracy, bits = best(share_XLE[:, layer])
        assert found.accuracy_L[layer] == pytest.approx(accuracy, abs=0.015)
        assert found.information_L[layer] == pytest.approx(bits, abs=0.015)
    accuracy, bits = best(np.stack([np.outer(*share_LE).ravel() for share_LE in share_XLE]))
    assert found.accuracy == pytest.approx(accuracy, abs=0.015)
    assert found.information_bits == pytest.approx(bits, abs=0.015)
    assert (found.majority, found.entropy_bits) == (0.5, 1)
    assert found.tokens_X.tolist() == [16000, 8000]


def test_experts_that_say_nothing_and_all():
    """Layer 0: experts of their own. Layer 1: the same shares in every domain. Two experts a token."""
    rng, own, low = np.random.default_rng(4), 1.0, 1e-9
    share_XLE = np.array([[[own] * 2 + [low] * 4, [1.0] * 6], [[low] * 2 + [own] * 2 + [low] * 2, [1.0] * 6]])
    found = expert_classifier(routed(rng, share_XLE, [2000, 2000], choices=2))
    assert found.accuracy_L[0] == 1
    assert found.information_L[0] == pytest.approx(1, abs=0.01)
    assert found.accuracy_L[1] == pytest.approx(0.5, abs=0.03)
    assert -0.01 < found.information_L[1] < 0.01
    assert found.accuracy == pytest.approx(1, abs=0.01)


def test_the_same_said_again_is_not_more():
    """12 layers with the same choices know what one knows, and are not surer."""
    rng, share_XE = np.random.default_rng(5), np.array([[0.6, 0.3, 0.1], [0.2, 0.4, 0.4]])
    choice_TL = np.concatenate([rng.choice(3, 3000, p=share_E) for share_E in share_XE])[:, None].repeat(12, axis=1)
    found = expert_classifier(observe(choice_TL[..., None], np.repeat([0, 1], 3000), experts=3))
    assert found.information_L == pytest.approx(found.information_L[0])
    assert found.information_bits == pytest.approx(found.information_L[0], abs=0.01)
    assert found.accuracy == found.accuracy_L[0]


def test_documents_are_not_mistaken_for_domains():
    """Every 100 tokens another document with other experts: known again they would tell the domain, which says nothing itself."""
    rng = np.random.default_rng(6)
    document_T = np.arange(2000) // 100
    choice_T = (3 * document_T + rng.integers(0, 3, 2000)) % 60
    choice_T = rng.permutation(60)[choice_T]
    observed = observe(choice_T[:, None, None], np.repeat([0, 1], 1000), experts=60, document_T=document_T, seq_len=20)
    found = expert_classifier(observed)
    assert found.accuracy_L[0] < 0.7
    assert found.information_L[0] < 0.02


def test_topics_are_not_trusted():
    """Documents of 100 tokens with topics, domains without: the evidence is scaled down to about nothing, not believed."""
    bits = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        choice_T = np.concatenate([rng.choice(8, 100, p=share_E) for share_E in rng.dirichlet(np.full(8, 0.5), 20)])
        found = expert_classifier(observe(choice_T[:, None, None], np.repeat([0, 1], 1000), experts=8, seq_len=20))
        bits.append(found.information_bits)
    assert -0.06 < np.mean(bits) < 0.02


def test_what_goes_nowhere_says_nothing():
    """Half of the tokens choose no expert: they are guessed, the others known."""
    domain_T = np.repeat([0, 1], 400)
    choice_T = np.where(np.arange(800) % 2, domain_T, 2)
    found = expert_classifier(observe(choice_T[:, None, None], domain_T, experts=2))
    assert found.accuracy == pytest.approx(0.75)
    assert found.information_bits == pytest.approx(0.5, abs=0.02)


def test_experts_may_be_renamed():
    rng = np.random.default_rng(7)
    choice_TLM = distinct(rng, rng.random((300, 5)), 2)[:, None]
    order_E = np.array([2, 0, 4, 1, 3])
    a, b = (
        expert_classifier(observe(choice, np.repeat([0, 1, 2], 100), experts=5)) for choice in (choice_TLM, order_E[choice_TLM])
    )
    assert a.information_bits == pytest.approx(b.information_bits)
    assert a.accuracy == pytest.approx(b.accuracy)


def test_a_sample_that_cannot_be_halved_is_refused():
    with pytest.raises(ObservationError, match="'domain1' has 1 rows"):
        expert_classifier(observe(np.zeros((20, 1, 1), np.int64), np.repeat([0, 1], [12, 8]), experts=2))
