"""A trained model as it is asked: its prompts and its generator, from a run folder or a checkpoint of Hugging Face."""

from pathlib import Path

from moe_jax.config import MeshConfig
from moe_jax.convert.hugging_face import CONFIG
from moe_jax.convert.initial import PREFIX, restore
from moe_jax.convert.safetensors_files import read_json
from moe_jax.mesh import data_shards
from moe_jax.models.generator import Generator
from moe_jax.models.inference_weights import lay_out_for_inference
from moe_jax.serve.prompts import Prompts
from moe_jax.train.run import Restored

LONGEST = 4096  # tokens of a context that nobody asked for, whatever a checkpoint says that it can do


class ServedModel:
    """What `launch.sample`, `launch.score` and `launch.serve` have in common.

    Attributes:
      tokenizer: of the model.
      prompts: how texts and conversations become tokens.
      context: tokens that the model was made for: a run's `data.seq_len`, a checkpoint's max_position_embeddings up to `LONGEST`.
      row_multiple: what a number of rows must be a multiple of.
    """

    def __init__(self, workdir: str, step: str, mesh: MeshConfig | None, *, plain: bool = True):
        """Restores the model.

        Args:
          workdir: a run folder, or "hf:FOLDER".
          step: "latest", "best" or a number.
          mesh: other than the run's.
          plain: whether conversations are written plainly though there is a chat template.

        Raises:
          ConfigError, CheckpointError, DataError: as `convert.initial.restore`.
        """
        self._restored: Restored = restore(workdir, step, mesh)
        self.tokenizer, source = self._restored.tokenizer, self._restored.config.data.tokenizer
        folder, is_checkpoint = (
            Path(source.removeprefix(PREFIX)) if source.startswith(PREFIX) else None,
            workdir.startswith(PREFIX),
        )
        self.prompts = Prompts(self.tokenizer, folder, as_is=is_checkpoint, plain=plain)
        self.context, self.row_multiple = self._restored.config.data.seq_len, data_shards(self._restored.mesh)
        if is_checkpoint:
            self.context = min(read_json(folder / CONFIG).get("max_position_embeddings") or self.context, LONGEST)

    def generator(self, *, rows: int, max_length: int, cache_dtype: str, weights: str) -> Generator:
        """For at least `rows` texts of `max_length` tokens. Once: the weights that were restored are let go.

        Raises:
          ConfigError: as `Generator` and `lay_out_for_inference`.
        """
        model, self._restored = self._restored, None
        rows = -(-rows // self.row_multiple) * self.row_multiple
        sizes = {"vocab_size": self.tokenizer.vocab_size, "rows": rows, "max_length": max_length}
        laid_out = lay_out_for_inference(model.config.model, model.params, model.router_state, model.mesh, weights)
        return Generator(laid_out, **sizes, cache_dtype=cache_dtype)
