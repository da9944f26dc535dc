"""Says how probable a trained model finds a text: `python -m launch.score --workdir=runs/quickstart --text="def main("`.

--workdir=hf:FOLDER takes a Hugging Face checkpoint. Prints the log-probability of every token, and for each text their sum, bits per
byte and perplexity. A text that is longer than --window is scored in pieces of as many tokens.
Of a checkpoint whose tokenizer puts nothing before a text, the first token has no score.
"""

import math
from pathlib import Path

import numpy as np
from absl import flags

from launch import cli
from moe_jax.config import ConfigError
from moe_jax.serve.model import ServedModel
from moe_jax.serve.prompts import check_encodable

WORKDIR = flags.DEFINE_string("workdir", None, "Run folder of launch.train, or hf:FOLDER.", required=True)
STEP = flags.DEFINE_string("step", "best", "Checkpoint: latest, best or a step.")
MESH = flags.DEFINE_string("mesh", "", "Mesh other than the run's, e.g. data=1,expert=1,emulate=0.")
TEXT = flags.DEFINE_multi_string("text", [], "Text to score; may be given several times.")
FILE = flags.DEFINE_multi_string("file", [], "File with a text to score; may be given several times.")
WINDOW = flags.DEFINE_integer(
    "window", 0, "Most tokens before one that it is given; 0 = what the model was made for.", lower_bound=0
)
WEIGHTS = flags.DEFINE_string("weights", "none", "Format of the matrices: none, int8, int4:GROUP.")
TOKENS = flags.DEFINE_bool("tokens", True, "Print every token too.")


def main():
    cli.keep_programs()
    texts = {f"--text={text!r}": text for text in TEXT.value} | {f"--file={name}": _read(name) for name in FILE.value}
    if not texts:
        raise ConfigError("there is nothing to score; give --text or --file.")
    for name, text in texts.items():
        if not text:
            raise ConfigError(f"{name} has no character to score; give a longer one.")
        check_encodable(text, "--text")
    model = ServedModel(WORKDIR.value, STEP.value, cli.parse_mesh(MESH.value))
    tokenizer, window = model.tokenizer, WINDOW.value or model.context
    generator = model.generator(rows=1, max_length=window + 1, cache_dtype="float32", weights=WEIGHTS.value)
    for name, text in texts.items():
        tokens_T = model.prompts.text(text)
        scored_T, log_prob_T = tokens_T[1:], np.concatenate(generator.score(_pieces(tokens_T, window)))
        if TOKENS.value:
            for token, log_prob in zip(scored_T, log_prob_T, strict=True):
                print(f"{log_prob:9.4f}  {tokenizer.decode([token])!r}")
        total, num_bytes = float(log_prob_T.sum(dtype=np.float64)), int(tokenizer.token_bytes()[scored_T].sum())
        bits = -total / math.log(2) / num_bytes if num_bytes else math.nan  # special tokens alone stand for no byte
        print(
            f"{name}: {len(scored_T):,} tokens, {num_bytes:,} bytes, log p = {total:.4f}, {bits:.4f} bits per byte,"
            f" perplexity {np.exp(-total / len(scored_T)):.3f}"
        )


def _read(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file={name} cannot be read as text ({error}); give a file in UTF-8.") from error


def _pieces(tokens_T: np.ndarray, window: int) -> list[np.ndarray]:
    """A text in pieces that score each of its tokens but the first once, given the `window` tokens at most before it in its piece."""
    return [tokens_T[i : i + window + 1] for i in range(0, max(len(tokens_T) - 1, 1), window)]


if __name__ == "__main__":
    cli.run(main)
