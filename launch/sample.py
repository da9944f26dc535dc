"""Continues text with a trained model: `python -m launch.sample --workdir=runs/quickstart --prompt="def main("`.

--workdir=hf:FOLDER takes a Hugging Face checkpoint. Text is printed as it is made. Several --prompt flags are continued together,
prompt i with seed + i, and printed one after the other.
"""

import dataclasses
from collections.abc import Iterator

from absl import flags

from launch import cli
from moe_jax.models.generator import CACHE_DTYPES
from moe_jax.models.sampling import Sampling
from moe_jax.serve.model import ServedModel
from moe_jax.serve.prompts import check_encodable
from moe_jax.serve.text import AnswerText

WORKDIR = flags.DEFINE_string("workdir", None, "Run folder of launch.train, or hf:FOLDER.", required=True)
STEP = flags.DEFINE_string("step", "best", "Checkpoint: latest, best or a step.")
MESH = flags.DEFINE_string("mesh", "", "Mesh other than the run's, e.g. data=1,expert=1,emulate=0.")
PROMPT = flags.DEFINE_multi_string("prompt", [""], "Text to continue; may be given several times.")
TOKENS = flags.DEFINE_integer("num_tokens", 200, "Tokens to add to each prompt.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the best token each time.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k best tokens; 0 = all.")
TOP_P = flags.DEFINE_float("top_p", 0.95, "Draw from the smallest set of tokens with this probability.")
MIN_P = flags.DEFINE_float("min_p", 0.0, "Draw from tokens with at least this fraction of the best one's probability.")
SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
STOP = flags.DEFINE_multi_string("stop", [], "Text before which an answer ends; may be given several times.")
CACHE_DTYPE = flags.DEFINE_enum("cache_dtype", "float32", CACHE_DTYPES, "Of keys and values.")
WEIGHTS = flags.DEFINE_string("weights", "none", "Format of the matrices: none, int8, int4:GROUP.")


def main():
    cli.keep_programs()
    samplings = [_sampling(i) for i in range(len(PROMPT.value))]
    for text in PROMPT.value:
        check_encodable(text, "--prompt")
    model = ServedModel(WORKDIR.value, STEP.value, cli.parse_mesh(MESH.value))
    tokens = [model.prompts.text(text) for text in PROMPT.value]
    longest = max(map(len, tokens)) + TOKENS.value
    formats = {"cache_dtype": CACHE_DTYPE.value, "weights": WEIGHTS.value}
    generator = model.generator(rows=len(tokens), max_length=longest, **formats)
    answers = [AnswerText(model.tokenizer, STOP.value) for _ in tokens]
    waiting, ended, shown = list(PROMPT.value), [False] * len(tokens), 0
    for row, text, last in _continued(generator, tokens, samplings, answers, model.prompts.stop_tokens):
        waiting[row], ended[row] = waiting[row] + text, last
        while shown < len(tokens):  # prompt by prompt: what the next ones have got so far waits
            print(waiting[shown], end=f"\n{'-' * 80}\n" if ended[shown] else "", flush=True)
            waiting[shown] = ""
            if not ended[shown]:
                break
            shown += 1


def _sampling(i: int) -> Sampling:
    """Of prompt `i`."""
    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value, SEED.value)
    return dataclasses.replace(sampling, seed=(SEED.value + i) % 2**32)


def _continued(generator, prompts, samplings, answers, stop_tokens) -> Iterator[tuple[int, str, bool]]:
    """(row, text to add, whether it is its last) until every row has `--num_tokens` tokens or has come to a stop."""
    drawn = generator.admit(dict(enumerate(prompts)), dict(enumerate(samplings)))
    while drawn:
        for row, (token, log_prob) in drawn.items():
            answer, stops = answers[row], token in stop_tokens
            text = "" if stops else answer.push(token, log_prob).text
            last = stops or answer.stopped or answer.num_tokens == TOKENS.value
            if last:
                generator.release(row)
                text += "" if answer.stopped else answer.finish().text
            yield row, text, last
        drawn = generator.step() if generator.live else {}


if __name__ == "__main__":
    cli.run(main)
