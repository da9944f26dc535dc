"""One of several processes with four devices each: `python one_of_several.py PROCESS PROCESSES PORT FOLDER WORKDIR`."""

import os
import pathlib
import sys

os.environ["NPROC"] = "8"  # two threads a device, as in moe_jax.mesh.emulate_devices

import jax

CHANGES = dict(
    mesh__emulate=0,
    train__steps=300,
    train__log_every=1,
    train__eval_every=150,
    train__checkpoint_every=1000,
    train__sample_tokens=0,
    train__tensorboard=False,
)


def main(process, processes, port, folder, workdir):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))

    import tiny_run

    from moe_jax.train import loop, preemption

    try:
        loop.train(tiny_run.config(pathlib.Path(folder), workdir, **CHANGES))
    except preemption.PreemptedError as stopped:
        print(stopped, flush=True)
        sys.exit(stopped.exit_status)


if __name__ == "__main__":
    main(*sys.argv[1:])
