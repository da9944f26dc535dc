"""What the programs share: refusals in one sentence, the project's own log lines, and a mesh written on the command line."""

import contextlib
import dataclasses
import logging
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

import absl.logging
import jax
from absl import app, flags
from ml_collections import config_flags

from moe_jax import processes, xla_flags
from moe_jax.config import Config, ConfigError, MeshConfig, from_dict
from moe_jax.data import cache
from moe_jax.train.preemption import PreemptedError
from moe_jax.validation import RefusalError

flags.disclaim_key_flags()  # a flag defined here belongs to the program that asked for it


def run(main: Callable[..., None], argument: str | None = None, *, computes: bool = True) -> None:
    """Parses the flags and runs `main`, with the positional arguments that `argument` names: "NAME", "A B", "RUN..." for one or more, or
    "[NAME]" for one that may be left out.

    What the package refuses is one sentence on stderr and exit status 2; `--v=1` shows the traceback and other libraries' logs too.
    A run that was told to stop and has saved its step exits with `preemption.EXIT_STATUS`. XLA is asked for what `mesh.xla_flags` of the
    program's config says, or its flag --xla_flags where it has no config; not by a program that only starts others (`computes`).
    """
    if "config" not in flags.FLAGS:
        meaning = "What to ask XLA for (moe_jax/xla_flags.py); none: what XLA_FLAGS says and no more."
        flags.DEFINE_enum("xla_flags", "recommended", xla_flags.CHOICES, meaning)

    def guarded(argv):
        names = (argument or "").split()
        if len(argv) > 1 + len(names) and not (names and names[-1].endswith("...")):
            raise app.UsageError(f"unexpected argument {argv[1 + len(names)]!r}; options are written --name=value.")
        if len(argv) < 1 + len(names) and not names[len(argv) - 1].startswith("["):
            raise app.UsageError(f"{names[len(argv) - 1].removesuffix('...')} is missing.")
        sys.stdout.reconfigure(line_buffering=True)  # into a file too, in order with stderr
        _set_up_logging()
        if computes:
            xla_flags.apply(_asked_of_xla())
        try:
            main(*argv[1:])
        except RefusalError as refusal:
            if absl.logging.get_verbosity() > 0:
                raise
            _refuse(str(refusal))
        except PreemptedError as stopped:
            if processes.first():
                print(stopped, file=sys.stderr)
            sys.exit(stopped.exit_status)

    app.run(guarded, flags_parser=_parse)


def _asked_of_xla() -> str:
    if "config" not in flags.FLAGS:
        return flags.FLAGS["xla_flags"].value
    with _refusing_flags():
        config = flags.FLAGS["config"].value
    return config.get("mesh", {}).get("xla_flags", "recommended")


def keep_programs() -> None:
    """Has compiled programs kept in the user's cache folder, unless JAX was told of another place (JAX_COMPILATION_CACHE_DIR)."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache.folder("") / "programs"))


def define_config(default: str, description: str) -> flags.FlagHolder:
    """The flag --config, whose value `read_config` gives; with it come --config.group.field, which are looked up here already."""
    with _refusing_flags():
        return config_flags.DEFINE_config_file("config", default, description, lock_config=True)


def read_config(flag: flags.FlagHolder) -> Config:
    """The validated config of a flag made by `define_config`. Raises ConfigError."""
    with _refusing_flags():
        return from_dict(flag.value)


def _refuse(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags; what is wrong with them is one sentence too, and help is not a failure."""
    with _refusing_flags():
        try:
            return flags.FLAGS(argv)
        except SystemExit:  # absl's, after it has printed the help
            sys.exit(0)


@contextlib.contextmanager
def _refusing_flags():
    """What absl and ml_collections raise over flags, as one sentence."""
    try:
        yield
    except OSError as error:  # a config file that cannot be opened is told at its first use
        _refuse(f"--config: {str(error).splitlines()[-1].strip()}; give a config file, e.g. configs/quickstart.py.")
    except flags.Error as error:
        refusals = [e for e in _causes(error) if isinstance(e, ConfigError)]
        _refuse(str(refusals[-1] if refusals else error))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        files = [pathlib.Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
        where = next(
            file for file in reversed(files) if file.name != "ast.py"
        ).parent.name  # ml_collections parses paths with it
        if where not in ("config_dict", "config_flags"):
            raise  # a fault in a config file's own code, not a field that a config does not have
        field = re.search(r"^\W*(?:Key \W)?(\w+)", str(error))[1] if where == "config_dict" else _looked_up(error)
        near = re.search(r'mean "(\w+)"', str(error))
        hint = f"did you mean {near[1]!r}?" if near else "configs/base.py has them all."
        _refuse(f"the config has no field {field!r}; {hint}")


def _looked_up(error):
    """The dotted path that ml_collections was following."""
    every = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next(names[name] for names in reversed(every) for name in ("field_path", "config_path") if names.get(name))


def _causes(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _set_up_logging():
    if not flags.FLAGS["verbosity"].present:
        absl.logging.set_verbosity(absl.logging.WARNING)
        absl.logging.get_absl_handler().addFilter(_tells_what_is_not_raised)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger = logging.getLogger("moe_jax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _tells_what_is_not_raised(record: logging.LogRecord) -> bool:
    """Not the stacks of Orbax's threads, whose errors it raises too: they would stand after the one sentence that says what is wrong."""
    return not (record.exc_info and {"orbax", "asyncio"} & set(pathlib.PurePath(record.pathname).parts))


def parse_mesh(text: str) -> MeshConfig | None:
    """`data=2,expert=4,emulate=8` as a MeshConfig, axes not named being 1 (data: what is left); None for "".

    Raises:
      ConfigError: an unknown axis or a size that is no integer.
    """
    sizes, known = {}, [field.name for field in dataclasses.fields(MeshConfig) if isinstance(field.default, int)]
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in known or not value.lstrip("-").isdigit():
            raise ConfigError(f"mesh = {text!r}: {item!r} is not axis=size; axes are {', '.join(known)}.")
        sizes[name] = int(value)
    return MeshConfig(**sizes) if sizes else None
