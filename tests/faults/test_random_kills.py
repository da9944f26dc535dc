"""Fifty kills at random moments over one run: the run that was never killed, to the bit."""

import itertools
import shutil

import lives
import pytest
import tiny_run

pytestmark = pytest.mark.faults
STEPS, EVERY = 320, 4
CHANGES = dict(
    train__steps=STEPS,
    train__log_every=1,
    train__checkpoint_every=EVERY,
    train__eval_every=24,
    train__sample_tokens=0,
    train__tensorboard=False,
)


def arguments(folder, workdir):
    return tiny_run.flags(folder, workdir, **CHANGES, train__record=str(folder / f"{workdir}.rec"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The run that nothing stops, in `folder`/straight and `folder`/straight.rec."""
    folder = tmp_path_factory.mktemp("kills")
    tiny_run.write_corpus(folder)
    lives.Run(folder / "straight", arguments(folder, "straight")).finish()
    return folder


def test_fifty_kills(folder, record_property):
    run, deaths = lives.Run(folder / "killed", arguments(folder, "killed")), []
    for kill in lives.plan(seed=8):
        before = run.saved()
        deaths.append(run.die(kill))
        print(
            f"{len(deaths)}: {kill}, {before} -> {deaths[-1].saved} saved, {deaths[-1].lost} lost, left {deaths[-1].torn}",
            flush=True,
        )
        lives.check(deaths[-1], before, EVERY)
    said = [*(death.said for death in deaths[1:]), run.finish()]
    for death, after in zip(deaths, said, strict=True):
        if "model  " in after:  # it lived long enough to look at the folder
            assert all(f"Skipped {folder}/killed/checkpoints/{name}:" in after for name in death.torn), after
    assert f"continuing from step {deaths[-1].saved} " in said[-1]
    record_property("figures", f"{len(deaths)} kills over {STEPS} steps\n{lives.table(deaths)}")
    tiny_run.assert_same_run(folder / "killed", folder / "straight")
    assert [line["step"] for line in tiny_run.metrics(folder / "killed")] == list(range(1, STEPS + 1))
    blocks, expected = ((folder / f"{name}.rec").read_bytes().split(b"\n", 2)[2] for name in ("killed", "straight"))
    assert blocks == expected
    left = {entry.name for entry in (folder / "killed" / "checkpoints").iterdir()}
    assert not [name for name in left if "tmp" in name]
    assert sum(bool(death.torn_now) for death in deaths) >= 5, "hardly a kill fell into a save"
    assert any(later.start > earlier.start for earlier, later in itertools.pairwise(deaths))
    shutil.rmtree(folder / "killed")
