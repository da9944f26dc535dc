"""Serves a model over HTTP as OpenAI's completions: `python -m launch.serve --workdir=runs/quickstart` (docs/serving.md).

--workdir=hf:FOLDER takes a Hugging Face checkpoint. Only this machine is listened to unless --host says otherwise. Everything is
compiled before the address is printed. SIGTERM and SIGINT finish what runs.
"""

import pathlib

from absl import flags

from launch import cli
from moe_jax.convert.initial import PREFIX
from moe_jax.models.generator import CACHE_DTYPES
from moe_jax.serve import check_extra

WORKDIR = flags.DEFINE_string("workdir", None, "Run folder of launch.train, or hf:FOLDER.", required=True)
STEP = flags.DEFINE_string("step", "best", "Checkpoint: latest, best or a step.")
MESH = flags.DEFINE_string("mesh", "", "Mesh other than the run's, e.g. data=1,expert=1,emulate=0.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; the server asks nobody who they are.")
PORT = flags.DEFINE_integer("port", 8000, "Port; 0 takes a free one.", lower_bound=0, upper_bound=65535)
NAME = flags.DEFINE_string("name", "", "The model's name for clients; the folder's if empty.")
ROWS = flags.DEFINE_integer("rows", 16, "Texts that are continued at once.", lower_bound=1)
MAX_LENGTH = flags.DEFINE_integer(
    "max_length", 0, "Tokens of prompt and answer; 0 = what the model was made for.", lower_bound=0
)
CACHE_DTYPE = flags.DEFINE_enum("cache_dtype", "float32", CACHE_DTYPES, "Of keys and values.")
WEIGHTS = flags.DEFINE_string("weights", "none", "Format of the matrices: none, int8, int4:GROUP.")
QUEUE = flags.DEFINE_integer("queue", 64, "Requests that may wait for a row; more are refused.", lower_bound=0)
MAX_BODY = flags.DEFINE_integer("max_body", 1 << 20, "Bytes of a request's body.", lower_bound=1)
CHAT_FORMAT = flags.DEFINE_enum("chat_format", "auto", ["auto", "plain"], "auto: the checkpoint's chat template if it has one.")
WARM_UP = flags.DEFINE_bool("warm_up", True, "Compile all programs before the first client, not when they are first needed.")
DRAIN = flags.DEFINE_float("drain_seconds", 30.0, "Time to finish in after a signal.", lower_bound=0)


def main():
    check_extra()
    cli.keep_programs()
    from moe_jax.serve.engine import Engine
    from moe_jax.serve.http import make_app
    from moe_jax.serve.model import ServedModel
    from moe_jax.serve.server import bind, serve, url
    from moe_jax.serve.warm_up import warm_up

    listener = bind(HOST.value, PORT.value)
    model = ServedModel(WORKDIR.value, STEP.value, cli.parse_mesh(MESH.value), plain=CHAT_FORMAT.value == "plain")
    max_length = MAX_LENGTH.value or model.context
    formats = {"cache_dtype": CACHE_DTYPE.value, "weights": WEIGHTS.value}
    generator = model.generator(rows=ROWS.value, max_length=max_length, **formats)
    if WARM_UP.value:
        warm_up(generator)
    engine = Engine(generator, QUEUE.value)
    name = NAME.value or pathlib.Path(WORKDIR.value.removeprefix(PREFIX)).resolve().name
    app = make_app(engine, model.prompts, name, MAX_BODY.value)
    ready = f"Serving {name} at {url(listener)}/v1: {generator.rows} rows of {max_length} tokens, {model.prompts.chat_format}."
    serve(app, engine, listener, DRAIN.value, ready=lambda: print(ready))


if __name__ == "__main__":
    cli.run(main)
