"""The start of a run from the full state of another: `start=RUN[@STEP]`.

Weights, the optimizer's moments, the number of steps done and with it the place in the data are taken over.
What may be others are steps, learning rate, schedule, batch, data and seed; with none of them changed the new
run ends with the numbers that the old one would have ended with, bit for bit.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from etils import epath
from orbax.checkpoint import v1 as ocp

from sparqle_jax.checkpoint import CheckpointError, checksums, differences, steps_in

# Of a run's identity, what the state is of, and what it does not depend on.
FIXED = r"(encoder|llm|llm tokenizer and template|config\.(adapter|encoder|stage2\.lora))\b"
LEFT_OUT = ("start", "init_from", "stage1.tokenizer")


@dataclasses.dataclass(frozen=True)
class Start:
    """A checkpoint of a stage of another run. written: what that run wrote down with it."""

    text: str
    stage: str
    step: int
    folder: epath.Path
    written: dict[str, Any]

    def load(self, state: Any) -> Any:
        """Its state, on the devices where the abstract `state` says. Raises CheckpointError if it is not as
        it was written."""
        loaded = ocp.load(self.folder, abstract_state=state)
        if checksums(loaded) != self.written["checksums"]:
            raise CheckpointError(f"start={self.text}: the checkpoint in {self.folder} is damaged.")
        return loaded

    def ancestry(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Where a run of this identity comes from, for its own identity: differences, and former ancestors.

        Raises ValueError for another adapter, encoder or LLM.
        """
        there, here = _compared(self.written["identity"], self.stage), _compared(identity, self.stage)
        changed = differences(there, json.loads(json.dumps(here)))
        if wrong := [line for line in changed if re.match(FIXED, line)]:
            raise ValueError(
                f"start={self.text} is of another model: {'; '.join(wrong)}. From a run whose adapter alone "
                "fits, take its weights: --set init_from=RUN/STAGE/adapter.safetensors."
            )
        sums = json.dumps(self.written["checksums"], sort_keys=True)
        return {
            "hash": hashlib.sha256(sums.encode()).hexdigest(),
            "from": self.text,
            "stage": self.stage,
            "step": self.step,
            "differences": changed,
            "before": self.written["identity"].get("start"),
        }


def find(text: str, stages: Sequence[str]) -> Start:
    """The checkpoint of RUN[@STEP] in the last of these stages that has any. Raises ValueError for none."""
    match = re.fullmatch(r"(.*)@(\d+)", text)
    run, wanted = (epath.Path(match[1]), int(match[2])) if match else (epath.Path(text), None)
    for stage in reversed(stages):
        folder = run / stage / "checkpoints"
        steps = steps_in(folder)
        if not steps:
            continue
        step = steps[-1] if wanted is None else wanted
        if step not in steps:
            raise ValueError(
                f"start={text}: {stage} of {run} has checkpoints of the steps {', '.join(map(str, steps))} "
                f"alone (its {stage}.keep says how many are kept): choose one of those."
            )
        metadata = ocp.metadata(folder / str(step))
        return Start(text, stage, step, folder / str(step), metadata.custom_metadata)
    raise ValueError(
        f"start={text}: {run} has no checkpoint of {' or '.join(stages)}. Give the folder of a run, with "
        "@STEP if it is not to be its last one."
    )


def lines(start: dict[str, Any] | None) -> list[str]:
    """The ancestry of a run in words, the latest first."""
    if start is None:
        return []
    changed = "; ".join(start["differences"]) or "nothing changed"
    return [f"{start['from']}, {start['stage']}, step {start['step']}: {changed}", *lines(start["before"])]


def _compared(identity: dict[str, Any], stage: str) -> dict[str, Any]:
    """The part of an identity that a state of this stage may differ in."""
    config = {key: x for key, x in identity["config"].items() if not key.startswith("stage") or key == stage}
    return {key: x for key, x in identity.items() if key not in LEFT_OUT} | {"config": config}
