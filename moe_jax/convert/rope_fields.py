"""Rotary positions: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""

import math
from dataclasses import dataclass
from typing import Any

from moe_jax.config import ModelConfig, RopeConfig
from moe_jax.convert.fields import Ours, Theirs, refuse

KINDS = {"default": "none", "linear": "linear", "llama3": "wavelength", "yarn": "yarn"}
# Fields that are one of ours in every kind that has them.
LINEAR = (("factor", "factor"),)
WAVELENGTH = (
    *LINEAR,
    ("low_freq_factor", "low_frequency_factor"),
    ("high_freq_factor", "high_frequency_factor"),
    ("original_max_position_embeddings", "original_length"),
)
YARN = (
    *LINEAR,
    ("beta_fast", "beta_fast"),
    ("beta_slow", "beta_slow"),
    ("truncate", "truncate"),
    ("original_max_position_embeddings", "original_length"),
)
FIELDS = {"none": (), "linear": LINEAR, "wavelength": WAVELENGTH, "yarn": YARN}
POSITIONS = 32768  # a new config.json's `max_position_embeddings` without a stretch: rotary positions have no end of their own


def magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's 0.1 weight ln(factor) + 1 (2309.00071, section 3.4; DeepSeek's `mscale`)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


@dataclass(frozen=True)
class Rope:
    """The rotary embedding.

    Attributes:
      theta: the base where the file has none.
      partial: the part of a head that rotates, where the file does not say; None for a family in which all does.
      latent: multi-head latent attention: what rotates has widths of its own, and a stretch multiplies the scores, too.
    """

    theta: float = 10000.0
    partial: float | None = None
    latent: bool = False

    def read(self, theirs: Theirs, ours: Ours) -> dict[str, Any]:
        """See `Relation`."""
        own = {name: theirs[name] for name in ("rope_theta", "partial_rotary_factor") if theirs.get(name) is not None}
        # the order in which transformers lets one win over another
        given = own | dict(theirs.get("rope_scaling") or theirs.get("rope_parameters") or {})
        if by_layer := [name for name, value in given.items() if isinstance(value, dict)]:
            raise refuse(
                "rope_parameters", given, f"has positions of its own for {by_layer[0]}; all layers have the same here."
            )
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in KINDS:
            known = ", ".join(KINDS)
            raise refuse(
                "rope_parameters.rope_type", kind, f"is not there in moe_jax, which has {known}; it cannot be converted."
            )
        rope = {"theta": float(given.get("rope_theta", self.theta)), "scaling": KINDS[kind], "dim": self._dim(given, ours)}
        stretch = self._stretch(theirs, given, KINDS[kind])
        found = {f"attention.rope.{name}": value for name, value in (rope | stretch).items()}
        return found | ({"attention.scale": self._scale(given, stretch, ours)} if self.latent else {})

    def _dim(self, given, ours):
        part = given.get("partial_rotary_factor", self.partial)
        if part in (None, 1.0):
            return 0
        if self.partial is None:
            raise refuse("partial_rotary_factor", part, "is not read by this architecture; remove it, or set 1.0.")
        return int(ours["attention.head_dim"] * part)

    def _stretch(self, theirs, given, kind):
        given = {name: value for name, value in given.items() if value is not None}
        positions = theirs.get("max_position_embeddings")
        usual = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "original_max_position_embeddings": positions}
        if kind == "yarn" and positions and "original_max_position_embeddings" in given:
            usual["factor"] = positions / given["original_max_position_embeddings"]
        given = usual | given
        if missing := [name for name, _ in FIELDS[kind] if given.get(name) is None]:
            raise refuse("rope_parameters", given, f"has no {missing[0]}, which its rope_type needs; add it.")
        stretch = {name: given[field] for field, name in FIELDS[kind]}
        return stretch | ({"amplitude": self._amplitude(given)} if kind == "yarn" else {})

    def _amplitude(self, given):
        """0 where it is what the factor gives by itself."""
        usual = magnitude(given["factor"])
        amplitude = given.get("attention_factor")
        if amplitude is None:
            above, below = given.get("mscale"), given.get("mscale_all_dim")
            amplitude = magnitude(given["factor"], above) / magnitude(given["factor"], below) if above and below else usual
        return 0.0 if math.isclose(amplitude, usual, rel_tol=1e-9) else float(amplitude)

    def _scale(self, given, stretch, ours):
        """DeepSeek-V2's and V3's: the scores times the square of the magnitude at `mscale_all_dim`."""
        weight = given.get("mscale_all_dim")
        if not weight or "factor" not in stretch:
            return 0.0
        width = ours["attention.head_dim"] + ours["attention.rope_head_dim"]
        return width**-0.5 * magnitude(stretch["factor"], weight) ** 2

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See `Relation`: the new field and the old ones, which older releases read."""
        rope = model.attention.rope
        kind = next(theirs for theirs, ours in KINDS.items() if ours == rope.scaling)
        stretch = {field: getattr(rope, name) for field, name in FIELDS[rope.scaling]}
        if rope.scaling == "yarn":
            stretch |= self._magnitudes(model, rope)
        part = {}
        if self.partial is not None:
            part = {"partial_rotary_factor": rope.dim / model.attention.head_dim if rope.dim else 1.0}
        scaling = {"rope_type": kind, "type": kind, **stretch} if stretch else None
        return {
            "rope_parameters": {"rope_type": kind, "rope_theta": rope.theta, **stretch, **part},
            "rope_theta": rope.theta,
            "rope_scaling": scaling,
            "max_position_embeddings": int(rope.original_length * rope.factor) or POSITIONS,
            **part,
        }

    def _magnitudes(self, model: ModelConfig, rope: RopeConfig):
        """`mscale` and `mscale_all_dim` where the scores are multiplied, else `attention_factor` where it is not the usual."""
        a, log = model.attention, 0.1 * math.log(rope.factor)
        amplitude = rope.amplitude or magnitude(rope.factor)
        usual = (a.head_dim + a.rope_head_dim) ** -0.5
        squared = a.scale / usual if a.scale else 1.0
        if not self.latent or math.isclose(squared, 1.0, rel_tol=1e-9) or log <= 0:
            return {"attention_factor": amplitude} if rope.amplitude else {}
        of_all = math.sqrt(squared)
        return {"mscale": (amplitude * of_all - 1) / log, "mscale_all_dim": (of_all - 1) / log}
