"""peft: LoRA in the folders that it reads and writes, adapter_config.json and adapter_model.safetensors."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from etils import epath
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import save as as_safetensors

from sparqle_jax import hosts, llms
from sparqle_jax.llms import decoder, lora
from sparqle_jax.tables import Rule, Table, export, load_state
from sparqle_jax.tensors import open_checkpoint

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")

DEFAULT_TARGETS = {decoder: ["q_proj", "v_proj"]}  # for target_modules=null

# Settings that are read, and those that change no result. Others must be off, or have one of these values.
READ = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules"),
}
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version", "inference_mode"),
    *("runtime_config", "megatron_core", "qalora_group_size"),
}
VALUES = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # PiSSA, OLoRA, CorDA and LoftQ change the frozen kernels as well.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}


def load_lora(folder: str | Path, llm: nnx.Module, *, mesh: Mesh | None = None) -> nnx.Module:
    """The LLM with the LoRA that peft saved for it in a folder; the frozen arrays are shared with `llm`.

    mesh: the one that the LLM lies on; without one LoRA goes to the first device. Raises FileNotFoundError
    and ValueError for what is no such folder, does not fit the LLM, or has more than LoRA.
    """
    folder = Path(folder)
    new = lora.add(llm, read_config(folder, llm), nnx.Rngs(0))
    graph, of_lora, rest = nnx.split(new, lambda path, _: path[-1] in ("lora_a", "lora_b"), ...)
    file = next((folder / name for name in WEIGHTS if (folder / name).exists()), folder / WEIGHTS[0])
    filled = load_state(of_lora, _table(new), open_checkpoint(file), name=str(file), mesh=mesh)
    return nnx.merge(graph, filled, rest)


def save_lora(llm: nnx.Module, folder: str | Path, *, base: str) -> None:
    """Saves an LLM's LoRA as a folder for peft. base: name or folder of the LLM in transformers' format.

    Of several hosts, which call this together, the first writes. Raises ValueError for an LLM without LoRA.
    """
    config, folder = llm.lora, epath.Path(folder)
    if config is None:
        raise ValueError("the LLM has no LoRA, so there is nothing to save: see lora.add.")
    tensors = export(nnx.state(llm), _table(llm))
    names = {target: _name(rule) for target, rule, _ in _modules(llm)}
    values = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        target_modules=sorted(names[target] for target in config.targets),
        rank_pattern={names[target]: rank for target, rank in config.ranks.items()},
        alpha_pattern={names[target]: alpha for target, alpha in config.alphas.items()},
        bias="none",
        fan_in_fan_out=False,
        init_lora_weights=True,
    )
    if hosts.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(values, indent=2))
        (folder / WEIGHTS[0]).write_bytes(as_safetensors(tensors, {"format": "pt"}))


def read_config(folder: str | Path, llm: nnx.Module) -> lora.Config:
    """The configuration of the LoRA that peft saved for this LLM in a folder. Raises as `load_lora` does."""
    file = Path(folder) / CONFIG
    if not file.exists():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: give a folder that peft saved.")
    values = json.loads(file.read_text())
    if refused := [f"{key}={value!r}" for key, value in values.items() if not _is_supported(key, value)]:
        raise ValueError(
            f"{file} has {', '.join(refused)}, but only plain LoRA of linear maps is supported: fold it into "
            "the LLM with peft (merge_and_unload), and give the folder of that LLM."
        )
    if "peft_type" not in values:
        raise ValueError(f"{file} has no peft_type: it is no configuration of peft's.")

    found: dict[str, set[tuple[int, float] | None]] = {}
    for target, rule, modules in _modules(llm):
        found.setdefault(target, set()).update(_rank_and_alpha(values, name, llm) for name in modules)
        if len(found[target]) > 1:
            raise ValueError(
                f"{file}: LoRA of {_name(rule)} is not the same in all layers, but of (rank, alpha) "
                f"{sorted(found[target], key=str)}. The layers are one stack here: all must have the same, "
                "or none may have any."
            )
    chosen = {target: one for target, (one,) in found.items() if one is not None}
    if not chosen:
        names = sorted({_name(rule) for _, rule, _ in _modules(llm)})
        raise ValueError(
            f"{file}: target_modules={values.get('target_modules')!r} match no linear map of the LLM; it has "
            f"{names}."
        )
    rank, alpha = values.get("r", 8), float(values.get("lora_alpha", 8))
    return lora.Config(
        rank=rank,
        alpha=alpha,
        dropout=values.get("lora_dropout", 0.0),
        targets=tuple(chosen),
        rslora=values.get("use_rslora", False),
        ranks={target: one[0] for target, one in chosen.items() if one[0] != rank},
        alphas={target: one[1] for target, one in chosen.items() if one[1] != alpha},
    )


def _is_supported(key: str, value: Any) -> bool:
    if key in VALUES:
        return value in VALUES[key]
    off = value is None or value is False or value in ("", [], {})
    return key in READ or key in HARMLESS or off


def _rank_and_alpha(values: dict[str, Any], module: str, llm: nnx.Module) -> tuple[int, float] | None:
    """The rank and alpha that peft gives a module, by its path in the LLM; None where it has no LoRA."""
    targets = values.get("target_modules")
    if targets is None:
        targets = DEFAULT_TARGETS[_part(llm)]
    if not (targets == "all-linear" or _matches(targets, module)):
        return None
    if _matches(values.get("exclude_modules") or [], module):
        return None
    rank = _by_pattern(values.get("rank_pattern"), module, values.get("r", 8))
    return rank, float(_by_pattern(values.get("alpha_pattern"), module, values.get("lora_alpha", 8)))


def _matches(names: str | list[str], module: str) -> bool:
    """Matches as peft does: a string is a regular expression, and a list has paths or their ends."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches, as in peft."""
    matching = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matching, default)


def _part(llm: nnx.Module):
    return next(part for part in llms.FAMILIES.values() if isinstance(llm, part.LLM))


def _modules(llm: nnx.Module) -> list[tuple[str, Rule, list[str]]]:
    """The linear maps that may have LoRA: target, the kernel's rule, modules in transformers."""
    rules = {rule.target: rule for rule in _part(llm).table(llm.config).rules}
    found = []
    for path, linear in lora.linears(llm).items():
        rule = rules[f"{path}.kernel"]
        source, layers = rule.source.removesuffix(".weight"), range(linear.kernel.shape[0])
        modules = [source.replace("{i}", str(layer * rule.every)) for layer in layers]
        found.append((path.rpartition(".")[2], rule, modules))
    return found


def _name(rule: Rule) -> str:
    """The name of a kernel's module: q_proj."""
    return rule.source.removesuffix(".weight").rpartition(".")[2]


def _table(llm: nnx.Module) -> Table:
    """The tensors of an LLM's LoRA in peft's files."""
    rules = []
    for target, rule, _ in _modules(llm):
        if target in llm.lora.targets:
            path, source = rule.target.removesuffix(".kernel"), rule.source.removesuffix(".weight")
            for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                tensor = f"base_model.model.{source}.{theirs}.weight"
                rules.append(dataclasses.replace(rule, target=f"{path}.{ours}", source=tensor))
    return Table(tuple(rules))
