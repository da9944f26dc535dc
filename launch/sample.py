"""Continues text with a trained model: `python -m launch.sample --workdir=runs/quickstart --prompt="def main("`.

--workdir=hf:FOLDER takes a Hugging Face checkpoint. Several --prompt flags are continued together. The whole prefix is recomputed for
every token.
"""

import jax
import numpy as np
from absl import flags

from launch import cli
from moe_jax.convert.initial import restore
from moe_jax.models.decode import check_sampling, make_next_token, sample

WORKDIR = flags.DEFINE_string("workdir", None, "Run folder of launch.train, or hf:FOLDER.", required=True)
STEP = flags.DEFINE_string("step", "best", "Checkpoint: latest, best or a step.")
MESH = flags.DEFINE_string("mesh", "", "Mesh other than the run's, e.g. data=1,expert=1,emulate=0.")
PROMPT = flags.DEFINE_multi_string("prompt", [""], "Text to continue; may be given several times.")
TOKENS = flags.DEFINE_integer("num_tokens", 200, "Tokens to add to each prompt.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the best token each time.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k best tokens; 0 = all.")
TOP_P = flags.DEFINE_float("top_p", 0.95, "Draw from the smallest set of tokens with this probability.")
SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")


def main():
    check_sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
    model = restore(WORKDIR.value, STEP.value, cli.parse_mesh(MESH.value))
    tokenizer = model.tokenizer
    prompts = [np.concatenate([[tokenizer.eot], tokenizer.encode(text)]).astype(np.int32) for text in PROMPT.value]
    with jax.set_mesh(model.mesh):
        next_token = make_next_token(
            model.graphdef, tokenizer.vocab_size, temperature=TEMPERATURE.value, top_k=TOP_K.value, top_p=TOP_P.value
        )
        window = model.config.data.seq_len
        arguments = (next_token, model.params, model.router_state, model.mesh, prompts, TOKENS.value)
        answers = sample(*arguments, window=window, seed=SEED.value, stop=tokenizer.eot)
    for text, answer in zip(PROMPT.value, answers, strict=True):
        print(f"{text}{tokenizer.decode(answer)}\n{'-' * 80}")


if __name__ == "__main__":
    cli.run(main)
