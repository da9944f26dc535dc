"""Texts from a model, several at once, each at its own place in it: read once (prefill), then a token at a time (decode)."""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from moe_jax.config import ConfigError, MoEConfig
from moe_jax.mesh import data_shards
from moe_jax.models.inference_weights import InferenceModel, separates
from moe_jax.models.sampling import Draws, Sampling, draw
from moe_jax.ops.separate_experts import SMALLEST_BLOCK
from moe_jax.validation import RefusalError

CACHE_DTYPES = ("float32", "bfloat16", "int8")
SHORTEST_BUCKET = 16  # tokens; buckets of prompts are this, twice this, ...
FEW_TOKENS = SMALLEST_BLOCK  # measured: ahead at 8 tokens, level at 16, behind at 24
PREFILL_TOKENS = 8192  # that go through the model at once when prompts are read or scored, where one text is not longer


class Drawn(NamedTuple):
    """A token, and the log of its probability by the model's own logits (temperature 1, nothing filtered)."""

    token: int
    log_prob: float


class Generator:
    """A model on its mesh, with a cache of `rows` texts. Not thread-safe.

    Programs are compiled for a bucket of shapes when it is first met: one for decoding, one for each (texts, length) of prompts, both
    rounded up: lengths to powers of two, texts to powers of four.

    Attributes:
      rows: texts at once; a multiple of the devices that split a batch.
      max_length: tokens a text may have, prompt and answer.
      vocab_size: of the tokenizer; what is drawn is less.
      live: rows with a text.
      model: what makes them.
      expert_load: int64 [L, E], assignments of each MoE layer's tokens to its experts since the start; [0, 0] for a dense model.
    """

    def __init__(self, model: InferenceModel, *, vocab_size: int, rows: int, max_length: int, cache_dtype: str = "float32"):
        """Makes an empty cache.

        Args:
          model: laid out for inference; others may use it too.
          vocab_size: of the tokenizer.
          rows: texts at once.
          max_length: tokens a text may have.
          cache_dtype: of keys and values; one of `CACHE_DTYPES`.

        Raises:
          ConfigError: an unknown dtype, or rows that the mesh does not divide.
        """
        if cache_dtype not in CACHE_DTYPES:
            raise ConfigError(f"cache_dtype = {cache_dtype!r} is unknown; choose one of {', '.join(CACHE_DTYPES)}.")
        shards, config = data_shards(model.mesh), model.config
        if rows < 1 or rows % shards:
            raise ConfigError(
                f"rows = {rows} must be a multiple of {shards}, the devices that split a batch on {dict(model.mesh.shape)}."
            )
        self.model, self.mesh, self.vocab_size, self.rows, self.max_length = model, model.mesh, vocab_size, rows, max_length
        with jax.set_mesh(self.mesh):
            new_cache = model.decoder(model.weights, "dropless").new_cache
            self._cache = jax.jit(lambda: new_cache(rows, max_length, cache_dtype))()
        self._shards, self._moe = shards, config.moe if config.num_moe_layers else None
        self.live: set[int] = set()
        self.expert_load = np.zeros((config.num_moe_layers, config.moe.num_experts if config.num_moe_layers else 0), np.int64)
        self._tokens_B, self._at_B, self._settings = (
            np.zeros(rows, np.int32),
            np.zeros(rows, np.int32),
            Draws.of([Sampling(0.0)] * rows),
        )
        self._prefill = jax.jit(self._prefill_program, donate_argnums=1)
        self._decode = jax.jit(self._decode_program, donate_argnums=1)
        self._score = jax.jit(self._score_program)

    def check(self, prompt: np.ndarray, num_tokens: int) -> None:
        """Raises RefusalError when a text of this prompt and `num_tokens` more cannot be made."""
        if len(prompt) == 0:
            raise RefusalError("the prompt has no token; begin with the tokenizer's end-of-text token for text from nothing.")
        if len(prompt) + num_tokens > self.max_length:
            raise RefusalError(
                f"the prompt has {len(prompt)} tokens and {num_tokens} are to follow, but max_length = {self.max_length}; ask for fewer."
            )
        if not 0 <= np.min(prompt) <= np.max(prompt) < self.vocab_size:
            raise RefusalError(
                f"the prompt has a token that is not in [0, {self.vocab_size}); encode it with the model's tokenizer."
            )

    def admit(self, prompts: Mapping[int, np.ndarray], samplings: Mapping[int, Sampling]) -> dict[int, Drawn]:
        """Reads new texts into free rows; each row's first token.

        Raises:
          RefusalError: a prompt that `check` refuses.
          ValueError: a row that is not free.
        """
        for row, prompt in prompts.items():
            self.check(prompt, 1)
            if row in self.live or not 0 <= row < self.rows:
                raise ValueError(f"row {row} is not a free row of {self.rows}.")
        drawn = {}
        for length, members in self._buckets({row: len(prompt) for row, prompt in prompts.items()}):
            tokens_PS, length_P, row_P = self._batch([prompts[row] for row in members], length, members)
            settings = Draws.of([samplings[row] for row in members] + [Sampling(0.0)] * (len(row_P) - len(members)))
            with jax.set_mesh(self.mesh):
                *answer, self._cache = self._prefill(self.model.weights, self._cache, tokens_PS, length_P, row_P, settings)
            token_P, log_prob_P = self._fetch(answer)
            for i, row in enumerate(members):
                drawn[row] = Drawn(int(token_P[i]), float(log_prob_P[i]))
                self._begin(row, len(prompts[row]), drawn[row].token, jax.tree.map(lambda column, i=i: column[i], settings))
        return drawn

    def step(self) -> dict[int, Drawn]:
        """One token more for every live row.

        Raises:
          ValueError: a row that is full.
        """
        live_B = np.isin(np.arange(self.rows), list(self.live))
        if np.any(full_B := live_B & (self._at_B >= self.max_length)):
            raise ValueError(
                f"row {int(np.argmax(full_B))} has {self.max_length} tokens, which is all it has room for; release it."
            )
        at_B = np.where(live_B, self._at_B, 0).astype(np.int32)
        with jax.set_mesh(self.mesh):
            *answer, self._cache = self._decode(self.model.weights, self._cache, self._tokens_B, at_B, live_B, self._settings)
        token_B, log_prob_B = self._fetch(answer)
        self._tokens_B = np.where(live_B, token_B, 0).astype(np.int32)
        self._at_B = at_B + live_B
        self._settings = self._settings.replace(number_B=self._settings.number_B + live_B)
        return {row: Drawn(int(token_B[row]), float(log_prob_B[row])) for row in sorted(self.live)}

    def release(self, row: int) -> None:
        """Makes a row free."""
        self.live.discard(row)
        self._settings.temperature_B[row] = 0.0  # a draw costs more than taking the best

    def score(self, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """For each text the log-probabilities of its tokens but the first, float32, each given those before it.

        Raises:
          RefusalError: a text of fewer than two tokens, or one that `check` refuses.
        """
        for text in texts:
            self.check(text, 0)
            if len(text) < 2:
                raise RefusalError("a text of one token has nothing to score; begin with the tokenizer's end-of-text token.")
        scores = {}
        for length, members in self._buckets({i: len(text) for i, text in enumerate(texts)}):
            tokens_PS, length_P, _ = self._batch([texts[i] for i in members], length, members)
            with jax.set_mesh(self.mesh):
                log_prob_PS = jax.device_get(self._score(self.model.weights, tokens_PS, length_P))
            scores |= {i: row_S[: len(texts[i]) - 1] for i, row_S in zip(members, log_prob_PS, strict=False)}
        return [scores[i] for i in range(len(texts))]

    def lower_step(self) -> jax.stages.Lowered:
        """The program of `step`, not compiled: to count what it does."""
        with jax.set_mesh(self.mesh):
            live_B = np.ones(self.rows, bool)
            return self._decode.lower(self.model.weights, self._cache, self._tokens_B, self._at_B, live_B, self._settings)

    def lower_prefill(self, num_texts: int, length: int) -> jax.stages.Lowered:
        """The program of `admit` for that many texts (a power of four for each of the devices that split a batch) of that bucket."""
        length_P, tokens_PS = np.full(num_texts, length, np.int32), np.zeros((num_texts, length), np.int32)
        with jax.set_mesh(self.mesh):
            settings = Draws.of([Sampling()] * num_texts)
            return self._prefill.lower(self.model.weights, self._cache, tokens_PS, length_P, length_P, settings)

    def _decoder(self, weights, num_tokens):
        """The model for a pass of `num_tokens` tokens on all devices."""
        return self.model.decoder(weights, expert_path(num_tokens // self._shards, self._moe))

    def _prefill_program(self, weights, cache, tokens_PS, length_P, row_P, settings):
        decoder = self._decoder(weights, tokens_PS.size)
        logits_PV, load_LE, cache = decoder.prefill(cache, tokens_PS, length_P, row_P)
        return *self._draw(logits_PV, settings), load_LE, cache

    def _decode_program(self, weights, cache, tokens_B, at_B, live_B, settings):
        logits_BV, load_LE, cache = self._decoder(weights, len(tokens_B)).decode(cache, tokens_B, at_B, live_B)
        return *self._draw(logits_BV, settings), load_LE, cache

    def _score_program(self, weights, tokens_PS, length_P):
        decoder = self._decoder(weights, tokens_PS.size)
        x_PSD, _, _ = decoder.forward(tokens_PS, length_P)
        logits_PSV = jax.sharding.reshard(decoder.logits(x_PSD), P())[:, :-1, : self.vocab_size].astype(jnp.float32)
        chosen_PS = jnp.take_along_axis(logits_PSV, tokens_PS[:, 1:, None], axis=-1)[..., 0]
        return chosen_PS - jax.nn.logsumexp(logits_PSV, axis=-1)

    def _draw(self, logits_BV, settings):
        return draw(jax.sharding.reshard(logits_BV, P())[:, : self.vocab_size], settings)

    def _fetch(self, answer):
        """The tokens and their log-probabilities on the host; the loads are added up."""
        token_B, log_prob_B, load_LE = jax.device_get(answer)
        self.expert_load += load_LE
        return token_B, log_prob_B

    def _begin(self, row, length, token, settings):
        self.live.add(row)
        self._tokens_B[row], self._at_B[row] = token, length
        for name in ("temperature_B", "top_k_B", "top_p_B", "min_p_B", "seed_B"):
            getattr(self._settings, name)[row] = getattr(settings, name)
        self._settings.number_B[row] = 1

    def _buckets(self, lengths):
        """(length, members) of the passes that texts of these lengths take."""
        of_length = defaultdict(list)
        for name, length in lengths.items():
            of_length[_power_of_two(max(length, SHORTEST_BUCKET))].append(name)
        for bucket, names in sorted(of_length.items()):
            length = min(bucket, max(self.max_length, SHORTEST_BUCKET))
            most = max(PREFILL_TOKENS // length // self._shards, 1) * self._shards
            for first in range(0, len(names), most):
                yield length, names[first : first + most]

    def _batch(self, texts, length, rows):
        """Texts in a bucket of `length`: tokens [P, S], lengths [P] and rows [P]; the empty ones have length 0 and no row."""
        num_rows = self._shards * 4 ** math.ceil(math.log2(-(-len(texts) // self._shards)) / 2)
        tokens_PS, length_P, row_P = (
            np.zeros((num_rows, length), np.int32),
            np.zeros(num_rows, np.int32),
            np.full(num_rows, -1, np.int32),
        )
        for i, (text, row) in enumerate(zip(texts, rows, strict=True)):
            tokens_PS[i, : len(text)], length_P[i], row_P[i] = text, len(text), row
        return tokens_PS, length_P, row_P


def continue_texts(
    generator: Generator,
    prompts: Sequence[np.ndarray],
    samplings: Sequence[Sampling],
    num_tokens: int,
    stop_tokens: Collection[int] = (),
) -> list[np.ndarray]:
    """Up to `num_tokens` new tokens of each prompt, all at once; an answer ends before a stop token. The generator's rows are free before
    and after.

    Raises:
      RefusalError: a prompt that `Generator.check` refuses.
      ValueError: more prompts than rows.
    """
    for prompt in prompts:
        generator.check(prompt, num_tokens)
    answers = [[] for _ in prompts]
    drawn = generator.admit(dict(enumerate(prompts)), dict(enumerate(samplings)))
    while drawn:
        for row, (token, _) in drawn.items():
            if token not in stop_tokens:
                answers[row].append(token)
            if token in stop_tokens or len(answers[row]) == num_tokens:
                generator.release(row)
        drawn = generator.step() if generator.live else {}
    return [np.asarray(answer, np.int32) for answer in answers]


def expert_path(num_tokens: int, moe: MoEConfig | None) -> str:
    """How experts are run for `num_tokens` tokens a device: "touched" or "dropless" (see `moe_jax.dispatch`).

    On a CPU the first up to `FEW_TOKENS`, whatever E and K: each touched expert then multiplies all tokens, and in the other way at least a
    block of as many rows (docs/inference.md; `python -m launch.bench expert_path`).
    """
    return "touched" if moe is not None and separates() and num_tokens <= FEW_TOKENS else "dropless"


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
