"""A policy that shares a budget out among tasks: a router over solvers that are unlike in cost and in skill.

An episode is a row of tasks of known difficulty and a budget in units of cost, and each task goes to one of four solvers. What a
solver costs and how often it is right are tables in closed form (`Tasks`), so every policy's expected share of right answers is exact
(`value`), and so is the best that any policy can do (`oracle`). The learned policy sees none of that: only which of its answers were
right. It is trained by REINFORCE (Williams 1992) with the mean of the other episodes on the same tasks as baseline (Kool et al. 2019).

Letters of this module: `I` tasks of an episode, in order; `J` difficulties; `U` budgets 0 .. `most`; `M` solvers; `G` groups of `R`
episodes each. A policy is a table `policy_IJUM` of probabilities: of task i, of difficulty j + 1, with u units left.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from moe_jax.validation import ConfigError

SOLVERS = ("guess", "heuristic", "steps", "tool")


@dataclass(frozen=True)
class Tasks:
    """Chains of 1 .. `difficulties` arithmetic operations whose answer is a digit, and what the four solvers make of them.

    The guess costs 0 and is right by chance; the heuristic costs 1, right with probability `first` decay^(d - 1); the step-by-step
    solver costs d, each step errs with `step_error`; the exact tool costs `tool_cost` and is always right.

    Raises:
      ConfigError: a number or a probability out of its range.
    """

    num_tasks: int = 12  # I, of an episode
    difficulties: int = 6  # J, all alike in number
    most: int = 72  # largest budget of an episode, in units of cost
    guess: float = 0.1  # right answers of a guess: one digit of ten
    first: float = 0.97  # right answers of the heuristic on one operation
    decay: float = 0.6  # and what each further operation leaves of them
    step_error: float = 0.05  # of each step of the step-by-step solver
    tool_cost: int = 6  # units

    def __post_init__(self):
        for field in ("num_tasks", "difficulties", "most", "tool_cost"):
            if getattr(self, field) < 1:
                raise ConfigError(f"Tasks.{field} = {getattr(self, field)} must be 1 or more; it is a number.")
        for field in ("guess", "first", "decay", "step_error"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigError(f"Tasks.{field} = {getattr(self, field)} must be between 0 and 1; it is a probability.")

    @property
    def right_JM(self) -> np.ndarray:
        """Probability that a solver is right, float32."""
        d_J = np.arange(1, self.difficulties + 1)
        columns = (0 * d_J + self.guess, self.first * self.decay ** (d_J - 1), (1 - self.step_error) ** d_J, 0 * d_J + 1.0)
        return np.stack(columns, axis=1).astype(np.float32)

    @property
    def cost_JM(self) -> np.ndarray:
        """Units of cost, int32."""
        d_J = np.arange(1, self.difficulties + 1)
        return np.stack([0 * d_J, 0 * d_J + 1, d_J, 0 * d_J + self.tool_cost], axis=1).astype(np.int32)

    @property
    def payable_JUM(self) -> np.ndarray:
        """Whether u units pay for a solver; a guess always is."""
        return self.cost_JM[:, None, :] <= np.arange(self.most + 1)[None, :, None]


@struct.dataclass
class Episodes:
    """What happened, [..., I]: difficulty - 1, units left before the choice, the solver chosen (int32), whether it was right (float32)."""

    difficulty: jax.Array
    budget: jax.Array
    choice: jax.Array
    right: jax.Array


def init_policy(key: jax.Array, tasks: Tasks, hidden: int = 32) -> dict[str, jax.Array]:
    """A multilayer perceptron of one hidden layer over difficulty (one-hot), units left per task left, and tasks left; it starts even."""
    inputs = tasks.difficulties + 3
    return {
        "w_in": jax.random.normal(key, (inputs, hidden)) / np.sqrt(inputs),
        "b_in": jnp.zeros(hidden),
        "w_out": jnp.zeros((hidden, len(SOLVERS))),
        "b_out": jnp.zeros(len(SOLVERS)),
    }


def log_policy(params: dict, tasks: Tasks, task: jax.Array, difficulty: jax.Array, budget: jax.Array) -> jax.Array:
    """Log-probabilities [..., M] of integer states [...]; -inf for what the units left do not pay."""
    left = tasks.num_tasks - task
    each = budget / (left * tasks.tool_cost)
    numbers = jnp.stack(jnp.broadcast_arrays(each, jnp.minimum(each, 1.0), left / tasks.num_tasks), axis=-1)
    x = jnp.concatenate([jax.nn.one_hot(difficulty, tasks.difficulties), numbers], axis=-1)
    logits = jnp.tanh(x @ params["w_in"] + params["b_in"]) @ params["w_out"] + params["b_out"]
    return jax.nn.log_softmax(jnp.where(jnp.asarray(tasks.cost_JM)[difficulty] <= budget[..., None], logits, -jnp.inf))


def tabulate(params: dict, tasks: Tasks) -> jax.Array:
    """The policy of these parameters as `policy_IJUM`."""
    states = np.meshgrid(*map(np.arange, (tasks.num_tasks, tasks.difficulties, tasks.most + 1)), indexing="ij")
    return jnp.exp(log_policy(params, tasks, *map(jnp.asarray, states)))


def rollout(params: dict, tasks: Tasks, key: jax.Array, difficulty_I: jax.Array, budget: jax.Array) -> Episodes:
    """Plays one episode on tasks of these difficulties (- 1) with `budget` units."""
    cost_JM, right_JM = jnp.asarray(tasks.cost_JM), jnp.asarray(tasks.right_JM)

    def play(budget, now):
        task, difficulty, key = now
        choosing, answering = jax.random.split(key)
        choice = jax.random.categorical(choosing, log_policy(params, tasks, task, difficulty, budget))
        right = jax.random.bernoulli(answering, right_JM[difficulty, choice])
        return budget - cost_JM[difficulty, choice], Episodes(difficulty, budget, choice, right.astype(jnp.float32))

    steps = jnp.arange(tasks.num_tasks), difficulty_I, jax.random.split(key, tasks.num_tasks)
    return jax.lax.scan(play, budget, steps)[1]


def rollouts(params: dict, tasks: Tasks, key: jax.Array, groups: int, episodes: int) -> Episodes:
    """Arrays [G, R, I]: groups of episodes on the same tasks with the same budget, both drawn evenly."""
    of_tasks, of_budgets, of_play = jax.random.split(key, 3)
    difficulty_GI = jax.random.randint(of_tasks, (groups, tasks.num_tasks), 0, tasks.difficulties)
    budget_G = jax.random.randint(of_budgets, (groups,), 0, tasks.most + 1)
    play = jax.vmap(jax.vmap(partial(rollout, params, tasks), (0, None, None)))
    return play(jax.random.split(of_play, (groups, episodes)), difficulty_GI, budget_G)


def surrogate(params: dict, tasks: Tasks, seen: Episodes) -> jax.Array:
    """Its gradient estimates that of the expected share of right answers, without bias, from episodes [G, R, I] of these parameters.

    E[grad log pi(choice) (right answers from here on - baseline)]. The baseline, the mean of the group's other episodes at the same
    task, does not depend on the episode's own choices. R is 2 or more.
    """
    log_pi = log_policy(params, tasks, jnp.arange(tasks.num_tasks), seen.difficulty, seen.budget)
    log_pi_GRI = jnp.take_along_axis(log_pi, seen.choice[..., None], axis=-1)[..., 0]
    to_go_GRI = jnp.cumsum(seen.right[..., ::-1], axis=-1)[..., ::-1] / tasks.num_tasks
    others_GRI = (to_go_GRI.sum(1, keepdims=True) - to_go_GRI) / (to_go_GRI.shape[1] - 1)
    return jnp.mean(jnp.sum(log_pi_GRI * (to_go_GRI - others_GRI), axis=-1))


def train(
    tasks: Tasks,
    key: jax.Array,
    steps: int = 600,
    groups: int = 32,
    episodes: int = 16,
    learning_rate: float = 0.02,
    every: int = 10,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """(params, value_NU): the trained policy, and its exact `value` before step 0, `every`, 2 `every` and so on.

    Raises:
      ConfigError: fewer than two episodes a group, which leave no baseline; steps that `every` does not divide.
    """
    if episodes < 2:
        raise ConfigError(f"episodes = {episodes} leaves no other episode as a baseline; use 2 or more.")
    if steps % every:
        raise ConfigError(f"steps = {steps} must be a multiple of every = {every}.")
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    start, of_steps = jax.random.split(key)
    params = init_policy(start, tasks)

    def step(carry, key):
        params, state = carry
        gradient = jax.grad(surrogate)(params, tasks, rollouts(params, tasks, key, groups, episodes))
        updates, state = optimizer.update(jax.tree.map(jnp.negative, gradient), state)
        return (optax.apply_updates(params, updates), state), None

    def some_steps(carry, keys):
        return jax.lax.scan(step, carry, keys)[0], value(tasks, tabulate(carry[0], tasks))

    keys = jax.random.split(of_steps, (steps // every, every))
    (params, _), value_NU = jax.jit(lambda carry: jax.lax.scan(some_steps, carry, keys))((params, optimizer.init(params)))
    return params, value_NU


def value(tasks: Tasks, policy_IJUM: jax.Array) -> jax.Array:
    """Exact expected share of right answers [U], by the budget that an episode starts with."""

    def back(value_U, policy_JUM):
        return jnp.mean(jnp.sum(policy_JUM * _worth(tasks, value_U), axis=-1), axis=0), None

    return jax.lax.scan(back, jnp.zeros(tasks.most + 1), policy_IJUM, reverse=True)[0]


def oracle(tasks: Tasks) -> jax.Array:
    """The policy of highest `value`, by dynamic programming from the last task to the first: it knows all probabilities, not the luck."""

    def back(value_U, _):
        worth_JUM = jnp.where(tasks.payable_JUM, _worth(tasks, value_U), -jnp.inf)
        return jnp.mean(jnp.max(worth_JUM, axis=-1), axis=0), jnp.argmax(worth_JUM, axis=-1)

    best_IJU = jax.lax.scan(back, jnp.zeros(tasks.most + 1), None, length=tasks.num_tasks, reverse=True)[1]
    return jax.nn.one_hot(best_IJU, len(SOLVERS))


def _worth(tasks, value_U):
    """[J, U, M]: right answers of a choice and of what comes after it, by value_U of the tasks after it, as a share of all tasks."""
    return jnp.asarray(tasks.right_JM)[:, None, :] / tasks.num_tasks + value_U[_units_after(tasks)]


def _units_after(tasks):
    """[J, U, M]: units left after a choice; 0 for what cannot be paid, which no policy chooses."""
    return np.maximum(np.arange(tasks.most + 1)[None, :, None] - tasks.cost_JM[:, None, :], 0)


def always(tasks: Tasks, solver: str) -> jax.Array:
    """One solver as long as the budget pays it, then guesses."""
    m = SOLVERS.index(solver)
    return _every_task(tasks, jax.nn.one_hot(np.where(tasks.payable_JUM[:, :, m], m, 0), len(SOLVERS)))


def at_random(tasks: Tasks) -> jax.Array:
    """What can be paid, all alike."""
    return _every_task(tasks, tasks.payable_JUM / tasks.payable_JUM.sum(-1, keepdims=True))


def fair_share(tasks: Tasks) -> jax.Array:
    """A rule of thumb that knows the tables: the solver most often right among those within the units left per task left."""
    share_IU = np.arange(tasks.most + 1) / np.arange(tasks.num_tasks, 0, -1)[:, None]
    within_IJUM = tasks.cost_JM[None, :, None, :] <= share_IU[:, None, :, None]
    choice_IJU = np.where(within_IJUM, tasks.right_JM[None, :, None, :], -1).argmax(-1)
    return jax.nn.one_hot(choice_IJU, len(SOLVERS))


def _every_task(tasks, policy_JUM):
    return jnp.broadcast_to(jnp.asarray(policy_JUM), (tasks.num_tasks, *policy_JUM.shape))


def choices_by_difficulty(tasks: Tasks, policy_IJUM: jax.Array, budget: int) -> jax.Array:
    """[J, M]: exact shares of the solvers among the tasks of a difficulty, in episodes that start with `budget` units.

    Raises:
      ConfigError: a budget below 0 or above `tasks.most`.
    """
    if not 0 <= budget <= tasks.most:
        raise ConfigError(f"budget = {budget} must be between 0 and Tasks.most = {tasks.most}.")

    def forward(chance_U, policy_JUM):
        chance_JUM = chance_U[:, None] * policy_JUM / tasks.difficulties
        return jnp.zeros_like(chance_U).at[_units_after(tasks)].add(chance_JUM), chance_JUM.sum(1)

    start_U = jnp.zeros(tasks.most + 1).at[budget].set(1.0)
    return jax.lax.scan(forward, start_U, policy_IJUM)[1].sum(0) * tasks.difficulties / tasks.num_tasks
