"""Layout invariance is a test that fails: each psum of the expert-parallel island is broken here by hand, in ways that still trace."""

import jax
import pytest
import test_layout_invariance as layouts
import tiny


def scaled(x, total):
    """The mean over eight devices where the sum belongs."""
    return jax.tree.map(lambda a: a // 8 if a.dtype == "int32" else a / 8, total)


def scaled_backwards(x, total):
    """The right value with twice its gradient: what a wrong transpose does, and no forward pass can show."""
    return jax.tree.map(lambda a: a if a.dtype == "int32" else 2 * a - jax.lax.stop_gradient(a), total)


def break_psum(monkeypatch, broken_axes, fault):
    """`fault(x, psum of x)` in place of the sums over `broken_axes`; the others stay."""
    psum = jax.lax.psum
    hits = []

    def broken(x, axes):
        if axes != broken_axes:
            return psum(x, axes)
        hits.append(axes)
        return fault(x, psum(x, axes))

    monkeypatch.setattr(jax.lax, "psum", broken)
    return hits


CASES = {
    "a mean over the batch axes": ("data 8", ("data",), scaled),
    "a gradient scaled over the batch axes": ("data 8", ("data",), scaled_backwards),
    "a gradient scaled over tensor": ("fsdp 2 expert 2 tensor 2", ("tensor",), scaled_backwards),
}


@pytest.mark.parametrize(("mesh", "axes", "fault"), CASES.values(), ids=CASES)
def test_a_wrong_psum_is_noticed(monkeypatch, mesh, axes, fault):
    layouts.reference("mixtral")  # before anything is broken
    hits = break_psum(monkeypatch, axes, fault)
    with pytest.raises(AssertionError, match=r"\['gradient'\].* differs by"):
        layouts.compare("mixtral", layouts.REFERENCE | {"mesh": mesh})
    assert hits


@pytest.mark.parametrize(("mesh", "axes"), [("data 8", ("data",)), ("fsdp 2 expert 2 tensor 2", ("tensor",))], ids=str)
def test_a_missing_psum_cannot_be_traced(monkeypatch, mesh, axes):
    hits = break_psum(monkeypatch, axes, lambda x, total: x)
    with pytest.raises(ValueError, match="out_specs"):
        layouts.measure(tiny.config("mixtral", mesh))
    assert hits
