"""Run folders made up so that what their report says is known, and a page taken apart."""

import dataclasses
import html.parser
import json
import pathlib

import numpy as np
import tiny_run
from specialisation_cases import observe

from moe_jax.config import to_dict
from moe_jax.data.corpus import load_corpus
from moe_jax.data.tokenizers import EOT, BytePairs, Bytes
from moe_jax.train import observation

HOSTILE = "</script><img src=x onerror=alert(1)>$x_1$"
NAME = "run <b onclick=alert(2)> & 'co' \"$\\frac$"
VOID = {"meta", "input", "link", "br", "hr", "img", "col"}
LAYERS, EXPERTS, TOKENS = (1, 3), 8, 4096


class Page(html.parser.HTMLParser):
    """The elements of a page in order, each with the names of those around it; the text of each name."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def values(self, *names):
        return [attributes[name] for _, attributes in self.elements for name in names if attributes.get(name)]

    def text(self):
        return " ".join(data for tag, data in self.texts if tag not in ("script", "style"))


def made_run(folder, *, specialised=True, observed=True, **changes):
    """A run folder with five records, three evaluations, and experts of which some belong to a domain, or none to any."""
    if not (folder / "corpus.jsonl").exists():
        corpus = tiny_run.write_corpus(folder)
        corpus.write_text(corpus.read_text().replace('"prose"', json.dumps(HOSTILE)))
    changes = {"data__tokenizer": "bpe", "model__num_layers": 4, "model__moe__every": 2, "model__moe__first_dense": 0} | changes
    config = tiny_run.config(folder, **changes)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=384))
    workdir = pathlib.Path(config.workdir)
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    git = {"commit": "0123456789abcdef", "dirty": True}
    versions = {"moe_jax": "0", "jax": "0.10.2", "device_kind": "cpu", "device_count": 8, "git": git}
    (workdir / "versions.json").write_text(json.dumps(versions))
    tokenizer = hostile_tokenizer() if config.data.tokenizer == "bpe" else Bytes()
    tokenizer.save(workdir / "tokenizer")
    moe = config.model.num_moe_layers > 0
    rng = np.random.default_rng(0)
    lines = [logged(step, rng, moe) | (evaluated(step) if step in (4, 8, 10) else {}) for step in (2, 4, 6, 8, 10)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 12, "cut sh')
    for step in (4, 8, 10) if observed and moe else ():
        observed_at(step, config, tokenizer, specialised).save(observation.path_of(workdir, step))
    return workdir


def hostile_tokenizer():
    """Bytes, and one token that would be code if it were not escaped."""
    vocab = json.loads(Bytes().to_json())["model"]["vocab"]
    vocab = {token: i for token, i in vocab.items() if token != EOT} | {HOSTILE.replace(" ", "Ġ"): 256, EOT: 257}
    return BytePairs("bpe", vocab, [])


def logged(step, rng, moe):
    """What a training step logs: expert 7 of the second layer has no token, the last steps have the most even loads."""
    figures = {"step": step, "train/loss": 6.0 - step / 4, "train/gradient_norm": 1.0, "train/tokens_per_second": 1000.0 + step}
    figures |= {"time/data": 0.5, "time/step": 2.0 * step, "time/evaluate": 1.0}
    if not moe:
        return figures
    load_LE = rng.multinomial(1000, np.ones(EXPERTS) / EXPERTS, len(LAYERS))
    load_LE[1, 0], load_LE[1, 7] = load_LE[1, [0, 7]].sum(), 0
    violation_L = load_LE.max(1) / load_LE.mean(1) - 1
    return figures | {
        "router/load": load_LE.tolist(),
        "router/max_violation": violation_L.tolist(),
        "router/noise_floor": [0.18, 0.18],
        "router/window/max_violation": (violation_L / 2).tolist(),
        "router/window/noise_floor": [0.1, 0.1],
        "router/entropy": [0.9, 0.8 - step / 50],
        "router/margin": [None, None],
        "router/dead_experts": [0, 1],
        "router/bias_range": [0.01 * step, 0.0],
        "router/gradient_ratio": [0.2, 0.3],
        "router/dropped_capacity": [0, 0],
        "router/dropped_sender": [0, 0],
        "router/dropped_receiver": [10 * step, 0],
    }


def evaluated(step):
    load_LE = np.full((2, EXPERTS), 100)
    load_LE[0, 3] = 100 + 10 * step
    figures = {"eval/loss": 5.0 - step / 10, "eval/bits_per_byte": 3.0, "eval/load": load_LE.tolist()}
    figures |= {"eval/max_violation": (load_LE.max(1) / load_LE.mean(1) - 1).tolist(), "eval/noise_floor": [0.2, 0.2]}
    return figures | {f"eval/{name}/{key}": 4.0 for name in ("code", HOSTILE) for key in ("loss", "bits_per_byte")}


def observed_at(step, config, tokenizer, specialised):
    """Two domains of 32 documents; if `specialised`, experts 0 to 3 of the first layer are for the one, 4 to 7 for the other."""
    rng = np.random.default_rng(step)
    K = config.model.moe.router.top_k
    domain_T = np.repeat([0, 1], TOKENS // 2)
    choice_TLM = rng.random((TOKENS, 2, EXPERTS)).argsort(-1)[..., :K]
    if specialised:
        choice_TLM[:, 0] = rng.random((TOKENS, EXPERTS // 2)).argsort(-1)[:, :K] + 4 * domain_T[:, None]
    counts = load_corpus(config.data, config.workdir).validation.counts()
    words = np.argsort(-counts, kind="stable")[:20]
    token_T = words[rng.integers(0, 20, TOKENS)]
    token_T[[0, 7, 3000]] = 256, 257, 10  # the hostile token, end of text, a new line
    seen = observe(
        choice_TLM,
        domain_T,
        experts=EXPERTS,
        document_T=np.arange(TOKENS) // (TOKENS // 64),
        token_T=token_T,
        seq_len=64,
        step=step,
    )
    norm_LE = rng.uniform(1, 2, (2, EXPERTS)).astype(np.float32)
    like_LEE = rng.uniform(-0.1, 0.1, (2, EXPERTS, EXPERTS)).astype(np.float32)
    about = dataclasses.replace(seen.about, layers=LAYERS, domains=("code", HOSTILE), drops=config.model.moe.may_drop, top_k=K)
    by_token = {int(token): i for i, token in enumerate(seen.vocabulary_N)}
    order = [by_token[int(token)] for token in words]
    return dataclasses.replace(
        seen,
        about=about,
        vocabulary_N=words.astype(np.int32),
        vocabulary_tokens_N=seen.vocabulary_tokens_N[order],
        vocabulary_load_NLE=seen.vocabulary_load_NLE[order],
        row_tokens_RS=token_T.reshape(-1, 64).astype(np.int32),
        expert_norm_LE=norm_LE,
        similarity_LEE=like_LEE,
        place_P=np.array([0, 8]),
        place_assigned_PL=np.full((2, 2), TOKENS * K // 2),
        place_dropped_PL=np.array([[0, 0], [64, 0]]),
        dropped_CL=np.array([[0, 0], [0, 0], [64, 0]]),
    )
