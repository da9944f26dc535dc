"""What a step multiplies: the matrix FLOPs of one device by part of the model, forward, backward and done again, from its jaxpr.

Two FLOPs a multiplication and addition. A product of arrays that the mesh splits counts a device's part; one inside `shard_map` is a
device's own already. Loops multiply. Grouped products count by rows: at the most their buffers hold, and at the load of perfectly
balanced routing (`Product.flops`), tokens of a device times experts a token. What is not known before a run: padding (taken to be none).

Attention counts what is computed, blocks of queries over all keys up to the block's end: more than the causal half, less than the whole.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from jax.extend.core import jaxprs_in_params

from moe_jax.config import Config
from moe_jax.mesh import BATCH_AXES
from moe_jax.ops.grouped_matmul_cpu import block_sizes
from moe_jax.plan.bodies import Body, Equation, bodies, is_expert_loop
from moe_jax.plan.program import Step
from moe_jax.routing import make_router

PARTS = ("attention projections", "attention scores", "router", "experts", "dense and shared", "head", "other")
PHASES = ("forward", "backward", "again")  # again: recomputed by remat, by attention's backward pass, or to count loads first
_SCORES = "XQN,XTN->XQT"  # the product that `ops.attention_blocks` does again in its backward pass


@dataclass(frozen=True)
class Product:
    """One matrix product of the program on one device.

    Attributes:
      part: one of `PARTS`.
      phase: one of `PHASES`.
      dtype: of the first operand.
      batch, rows, terms, columns: of one execution: batch products of [rows, terms] by [terms, columns]; of a grouped one batch is the
        number of groups and rows those of one group at balanced load.
      times: executions in a step, on average where a branch decides.
      worst: of one execution, FLOPs where every row of the buffers is used; as `flops` where no routing decides.
      bytes: read and written by one execution: each operand and the result once.
    """

    part: str
    phase: str
    dtype: str
    batch: int
    rows: float
    terms: int
    columns: int
    times: float
    worst: float
    bytes: float

    @property
    def flops(self) -> float:
        """Of one execution, at balanced load."""
        return 2.0 * self.batch * self.rows * self.terms * self.columns


def products(step: Step) -> list[Product]:
    """Every matrix product of the step, in the order of its bodies."""
    rows = expert_rows(step.config, dict(step.mesh.shape))
    found = []
    for body in bodies(step):
        for equation in body.equations:
            found += _products_of(equation, body, step.config, rows)
    return found


def flops(found: Iterable[Product], *, worst: bool = False) -> dict[str, dict[str, float]]:
    """FLOPs of one device and step, by part and phase; at balanced load, or at the most the buffers can hold."""
    table = defaultdict(lambda: dict.fromkeys(PHASES, 0.0))
    for p in found:
        table[p.part][p.phase] += p.times * (p.worst if worst else p.flops)
    return {part: table[part] for part in PARTS if part in table}


def expert_rows(config: Config, sizes: dict[str, int]) -> float:
    """Rows of a device's experts together in one pass of one layer over one microbatch, at balanced load: T K of its own tokens, since
    as many come as go. A chunk of an exchange has its part of them."""
    model, data = config.model, config.data
    if not model.num_moe_layers:
        return 0.0
    tokens = data.batch_size * data.seq_len / config.train.accumulation / math.prod(sizes[axis] for axis in BATCH_AXES)
    return tokens * float(make_router(model.moe.router, model.moe.num_experts).active_experts) / model.moe.exchange_chunks


def phase(path: str) -> str:
    """Of an operation, by the names JAX gave its place."""
    if "rematted_computation" in path or "jvp" not in path:
        return "again"
    return "backward" if "transpose(" in path else "forward"


def part(path: str, shapes: Iterable[tuple[int, ...]], config: Config, scans: int) -> str:
    """Of a product outside attention's scores: by its named scope, or by the vocabulary among its shapes."""
    scopes = path.split("/")
    for scope, name in (("experts", "experts"), ("route", "router"), ("attention", "attention projections")):
        if scope in scopes:
            return name
    if any(config.model.vocab_size in shape for shape in shapes):
        return "head"
    layers = scans > (config.train.accumulation > 1) and not {"dispatch", "combine"} & set(scopes)
    return "dense and shared" if layers else "other"


def is_score_product(equation: Equation, body: Body) -> bool:
    """Whether this is a product of attention of which neither side is a weight: of queries and keys, of weights and values."""
    if equation.primitive != "dot_general" or not body.manual or "attention" not in equation.path.split("/"):
        return False
    return bool(equation.params["dimension_numbers"][1][0])


def _products_of(equation: Equation, body: Body, config, rows) -> list[Product]:
    if equation.primitive == "dot_general":
        return _dense(equation, body, config)
    if equation.primitive == "pallas_call" and "experts" in equation.path.split("/"):
        return [_grouped(equation, body, rows, _kernel_shape(equation))]
    if is_expert_loop(equation):
        return [_grouped(equation, body, rows, shape) for shape in _loop_shapes(equation)]
    return []


def _dense(equation, body, config):
    (left, right), (result,) = equation.ins, equation.outs
    (left_terms, right_terms), (left_batch, right_batch) = equation.params["dimension_numbers"]
    free = [
        math.prod(n for i, n in enumerate(value.shape) if i not in (*terms, *batch))
        for value, terms, batch in ((left, left_terms, left_batch), (right, right_terms, right_batch))
    ]
    if free == [1, 1] and left_batch:  # a sum over rows, element by element
        return []
    batch, terms = (math.prod(left.shape[i] for i in dims) for dims in (left_batch, left_terms))
    if is_score_product(equation, body):
        name, when = "attention scores", phase(equation.path)
        when = "again" if when == "backward" and equation.path.endswith(_SCORES) else when
    else:
        name = part(equation.path, (left.whole, right.whole, result.whole), config, body.scans)
        when = phase(equation.path)
    moved = left.bytes + right.bytes + result.bytes
    worst = 2.0 * batch * terms * math.prod(free)
    return [Product(name, when, left.dtype, batch, free[0], terms, free[1], body.times * body.share, worst, moved)]


def _grouped(equation, body, balanced, shape):
    """A grouped product of (dtype, most rows, groups, terms, columns); what it moves is the balanced rows' and all weights."""
    dtype, most, groups, terms, columns = shape
    rows = min(balanced, most)
    moved = itemsize(dtype) * (rows * (terms + columns) + groups * terms * columns)
    worst = 2.0 * most * terms * columns
    times = body.times * body.share
    return Product("experts", phase(equation.path), dtype, groups, rows / groups, terms, columns, times, worst, moved)


def _kernel_shape(equation):
    """Of [A, D] by [E, D, F] in any order, the result included: rows are those of a matrix, groups of the one of three axes."""
    values = (*equation.ins, *equation.outs)
    weights = next(v for v in values if len(v.shape) == 3)
    rows = max(v.shape[0] for v in equation.ins if len(v.shape) == 2)
    return weights.dtype, rows, *weights.shape


def _loop_shapes(equation):
    """Of the loop over experts: as many products as one of its blocks has, for a block of one row."""
    groups, matrices = equation.params["length"], [v for v in equation.ins if len(v.shape) == 2]
    most = max(v.shape[0] for v in matrices)
    size = block_sizes(most, groups)[0]
    blocks = [
        list(_dots(body)) for jaxpr in jaxprs_in_params(equation.params) for e in jaxpr.eqns for body in _bodies_of_while(e)
    ]
    largest = max(blocks, key=lambda dots: sum(math.prod(dims) for dims, _ in dots))
    for (rows, terms, columns), dtype in largest:
        known = sorted((rows, terms, columns))  # the block's rows are one of the three, in whatever place
        known.remove(size)
        yield dtype, most, groups, *known


def _bodies_of_while(eqn):
    body = eqn.params.get("body_jaxpr")
    return [getattr(body, "jaxpr", body)] if eqn.primitive.name == "while" else []


def _dots(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (terms, other), _ = eqn.params["dimension_numbers"]
            left, right = (v.aval.shape for v in eqn.invars)
            rows = math.prod(n for i, n in enumerate(left) if i not in terms)
            columns = math.prod(n for i, n in enumerate(right) if i not in other)
            yield (rows, math.prod(left[i] for i in terms), columns), eqn.invars[0].aval.dtype.name
        for body in jaxprs_in_params(eqn.params):
            yield from _dots(body)


def itemsize(dtype: str) -> int:
    """Bytes of one number of a dtype of products."""
    return 2 if dtype in ("bfloat16", "float16") else 1 if dtype.startswith(("float8", "int8")) else 4
