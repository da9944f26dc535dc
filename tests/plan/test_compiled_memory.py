"""The estimate against the compilers, config by config: docs/plans/memory.md in the making. Minutes each; the matrix tier."""

import functools
import itertools

import memory_cases as cases
import pytest
import topology as topologies

from moe_jax.plan.memory import DOUBT


@pytest.mark.matrix
@pytest.mark.parametrize("name", cases.PAIRS)
def test_the_estimate_is_close_to_the_compilers(name):
    topologies.devices(cases.PAIRS[name].topology)
    ours, theirs = cases.predicted(cases.PAIRS[name]), cases.compiled(cases.PAIRS[name])
    if theirs.refusal:
        assert ours.total > (1 - DOUBT) * theirs.memory
    else:
        assert ours.total == pytest.approx(theirs.peak, rel=DOUBT)


@pytest.mark.matrix
def test_meshes_are_in_the_compilers_order():
    """Of any two that differ by more than 3 %, the one that needs more needs more by both."""
    topologies.devices("v5p:4x4x4")
    ours = {name: cases.predicted(case).total for name, case in cases.MESHES.items()}
    theirs = {name: of_compiler(name) for name in cases.MESHES}
    for one, other in itertools.combinations(cases.MESHES, 2):
        if abs(theirs[one] - theirs[other]) > 0.03 * max(theirs[one], theirs[other]):
            assert (ours[one] < ours[other]) == (theirs[one] < theirs[other]), (one, other)


@functools.cache
def of_compiler(name):
    found = cases.compiled(cases.MESHES[name], quick=True)
    return found.peak or max(found.total, found.memory)
