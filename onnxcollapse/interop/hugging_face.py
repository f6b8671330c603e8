# SPDX-License-Identifier: Apache-2.0
"""Exports a Hugging Face model, a folder or an id, with optimum."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcollapse.calibration.masks import is_cache_name
from onnxcollapse.errors import ModelError, OptionError
from onnxcollapse.interop.agreement import Run
from onnxcollapse.interop.draft import Draft
from onnxcollapse.interop.foreign import first_line, silenced
from onnxcollapse.model import Model, files

if TYPE_CHECKING:
    import torch

Computing = Callable[["torch.nn.Module", str, set[str]], Iterator[Run]]
"""Makes runs of a module, given its task and the names of the export's inputs."""

AUTO, WITH_PAST, GENERATION, TRANSLATION = "auto", "-with-past", "text-generation", "text2text-generation"
_MERGED_OF = ("decoder_model.onnx", "decoder_with_past_model.onnx")
ROWS, TOKENS, PADDING = 3, 11, 3  # of what the model is checked on; optimum traces 2 rows of 16 tokens


def draft(
    source: str, folder: Path, *, opset: int | None, dtype: str, task: str, cache: bool | None, seed: int
) -> Draft:
    """Exports a model into a folder, with its config and tokenizer.

    Args:
        source: The folder or id.
        folder: Where the files are written.
        opset: The opset; None for what optimum advises.
        dtype: fp32, fp16 or bf16.
        task: A task of optimum's; "auto" for that of the model's class.
        cache: Whether a decoder reads and gives a KV cache; None for what the task says.
        seed: Of the inputs to check the model on.

    Raises:
        ModelError: The source cannot be read or exported.
        OptionError: The model does not have the task.
    """
    from optimum.exporters.onnx import main_export

    config = _config(source)
    task = _task(source, config, task, cache)
    try:
        with silenced():
            main_export(
                source,
                folder,
                task=task,
                opset=opset,
                dtype=dtype,
                do_validation=False,
                library_name="transformers",
            )
    except Exception as error:  # optimum, transformers and torch raise anything
        raise ModelError(
            f"{source}: optimum cannot export it for {task} in {dtype}: {first_line(error)}; -v shows more"
        ) from error
    path = _main_file(source, folder)
    runs = partial(_runs, source, path, task, seed)
    if path.name != files.MERGED:
        return Draft(path, partial(runs, _decoded if _is_decoder(task) else _computed), task)
    encoder = Draft(path.with_name(files.ENCODER), partial(runs, _encoded), task)
    return Draft(path, partial(runs, _translated), task, (encoder,))


def _config(source: str) -> Any:
    from transformers import AutoConfig

    remedy = "give a folder with config.json and weights, an id that can be fetched, or pkg.mod:function"
    if Path(source).is_dir() and not (Path(source) / "config.json").exists():  # transformers would guess
        raise ModelError(f"folder {source} holds no config.json; {remedy}")
    try:
        with silenced():
            return AutoConfig.from_pretrained(source)
    except Exception as error:  # transformers and its hub client raise anything
        raise ModelError(f"{source}: {first_line(error)}; {remedy}") from error


def _task(source: str, config: Any, task: str, cache: bool | None) -> str:
    """The task in optimum's words, with or without a KV cache."""
    from optimum.exporters.tasks import TasksManager

    try:
        known = TasksManager.get_supported_tasks_for_model_type(
            config.model_type, "onnx", library_name="transformers"
        )
    except KeyError as error:
        raise ModelError(f"{source}: optimum does not export models of type {config.model_type!r}") from error
    plain = TasksManager.map_from_synonym(task).removesuffix(WITH_PAST)
    with_past = task.endswith(WITH_PAST)
    if task == AUTO:
        plain = _inferred(source, config)
        if plain not in known and TRANSLATION in known:  # a BART is said to be for fill-mask
            plain = TRANSLATION
        with_past = cache is None and plain + WITH_PAST in known
    wanted = plain + WITH_PAST if (with_past if cache is None else cache) else plain
    if wanted not in known:
        raise OptionError(
            f"{source}: a {config.model_type} has no task {wanted!r}; it has {', '.join(known)}"
        )
    return wanted


def _inferred(source: str, config: Any) -> str:
    import transformers
    from optimum.exporters.tasks import TasksManager

    for name in config.architectures or ():
        made = getattr(transformers, name, None)
        if made is not None:
            try:
                return str(TasksManager.infer_task_from_model(made))
            except (KeyError, ValueError):
                break
    raise OptionError(f"{source}: config.json does not say which task the model is for; give --task")


def _main_file(source: str, folder: Path) -> Path:
    """The only file, or the merged decoder beside an encoder; what it was merged of is taken away."""
    found = {path.name: path for path in sorted(folder.rglob("*.onnx"))}
    if set(found) - set(_MERGED_OF) == {files.MERGED, files.ENCODER}:
        for name in _MERGED_OF:
            for path in found[files.MERGED].parent.glob(f"{name}*"):
                path.unlink()
        return found[files.MERGED]
    if len(found) != 1:
        raise ModelError(
            f"{source}: optimum exports it as {', '.join(found)}; only single files, and a decoder with a cache beside "
            f"its encoder, can be checked and optimized; choose another --task, with {WITH_PAST} where there is one"
        )
    return next(iter(found.values()))


def _runs(source: str, path: Path, task: str, seed: int, make: Computing) -> Iterator[Run]:
    """What the source, loaded anew in fp32, computes for random inputs of a shape that was not traced."""
    import torch
    from optimum.exporters.tasks import TasksManager

    names = {spec.name for spec in Model.load(path).signature().inputs}
    try:
        with _seeded(seed), torch.no_grad(), silenced():
            module = TasksManager.get_model_from_task(
                task,
                source,
                framework="pt",
                torch_dtype=torch.float32,
                library_name="transformers",
                device="cpu",
            ).eval()
            runs = list(make(module, task, names))
    except Exception as error:  # the source's code: anything may come
        raise ModelError(
            f"{source}: it was exported, but cannot run in torch to be compared: {first_line(error)}; -v shows more"
        ) from error
    yield from runs


def _is_decoder(task: str) -> bool:
    return task.endswith(WITH_PAST) or task == GENERATION


def _decoded(module: torch.nn.Module, task: str, names: set[str]) -> Iterator[Run]:
    """Decoders: padded rows of tokens in one pass; with a cache all tokens but the last, then that one through it."""
    import torch

    vocabulary = module.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    ids, mask = torch.randint(0, vocabulary, (ROWS, TOKENS)), _mask(ROWS, TOKENS, end=1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in names:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    outputs = {
        name: value.numpy()
        for name, value in module(**inputs).items()
        if name in ("logits", "last_hidden_state")
    }
    for part, caches in _steps(names):
        feeds = {"input_ids": ids[:, part].numpy(), "attention_mask": mask[:, : part.stop].numpy()}
        yield Run(feeds, {name: value[:, part] for name, value in outputs.items()}, caches)


def _steps(names: set[str]) -> Iterator[tuple[slice, dict[str, str]]]:
    """Tokens that run at once, with the caches that they are given: all tokens, or all but the last and that one."""
    caches = {
        name: name.replace("past_key_values", "present") for name in sorted(names) if is_cache_name(name)
    }
    if not caches:
        yield slice(0, TOKENS), {}
        return
    yield slice(0, TOKENS - 1), {}
    yield slice(TOKENS - 1, TOKENS), caches


def _encoded(module: torch.nn.Module, task: str, names: set[str]) -> Iterator[Run]:
    """Encoders of two: the states that the decoder reads."""
    inputs = _encoder_inputs(module, task)
    states = module.get_encoder()(**inputs).last_hidden_state  # type: ignore[operator]
    yield Run({name: value.numpy() for name, value in inputs.items()}, {"last_hidden_state": states.numpy()})


def _translated(module: torch.nn.Module, task: str, names: set[str]) -> Iterator[Run]:
    """Decoders of two: tokens in one pass, then the last one through the caches, its own and the encoder's."""
    import torch

    inputs = _encoder_inputs(module, task)
    states = module.get_encoder()(**inputs)  # type: ignore[operator]
    vocabulary = module.config.get_text_config(decoder=True).vocab_size  # type: ignore[union-attr, operator]
    ids = torch.randint(0, vocabulary, (ROWS, TOKENS))
    masks = {name: value for name, value in inputs.items() if name == "attention_mask"}
    logits = module(decoder_input_ids=ids, encoder_outputs=states, **masks).logits.numpy()
    given = {"encoder_hidden_states": states.last_hidden_state.numpy()}
    given |= {f"encoder_{name}": value.numpy() for name, value in masks.items()}
    for part, caches in _steps(names):
        flag = {"use_cache_branch": np.array([bool(caches)])}
        yield Run({**given, **flag, "input_ids": ids[:, part].numpy()}, {"logits": logits[:, part]}, caches)


def _encoder_inputs(module: torch.nn.Module, task: str) -> dict[str, torch.Tensor]:
    """What optimum draws for an encoder of its kind, with padding where there is a mask."""
    inputs = _drawn(_exporter_config(module, task).with_behavior("encoder"))
    if "attention_mask" in inputs:
        inputs["attention_mask"] = _mask(ROWS, TOKENS)
    return inputs


def _exporter_config(module: torch.nn.Module, task: str) -> Any:
    from optimum.exporters.tasks import TasksManager

    constructor = TasksManager.get_exporter_config_constructor(
        exporter="onnx", model=module, task=task, library_name="transformers"
    )
    return constructor(module.config)


def _drawn(config: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = config.generate_dummy_inputs(
        framework="pt", batch_size=ROWS, sequence_length=TOKENS
    )
    return found


def _mask(rows: int, tokens: int, end: int = 0) -> torch.Tensor:
    """Ones, but for some padding before the last `end` tokens of the last row."""
    import torch

    mask = torch.ones(rows, tokens, dtype=torch.int64)
    mask[-1, tokens - end - PADDING : tokens - end] = 0
    return mask


def _computed(module: torch.nn.Module, task: str, names: set[str]) -> Iterator[Run]:
    """All other models: the inputs that optimum draws for their kind."""
    import torch

    config = _exporter_config(module, task)
    inputs = _drawn(config)
    if not all(isinstance(value, torch.Tensor) for value in inputs.values()):
        return  # nested inputs: nothing is compared, which the check says
    if inputs.get("attention_mask", torch.empty(0)).shape == (ROWS, TOKENS):
        inputs["attention_mask"] = _mask(ROWS, TOKENS)
    made = module(**inputs)
    renamed = config.torch_to_onnx_output_map
    expected = {renamed.get(name, name): value for name, value in made.items()}
    wanted = {name: expected[name].numpy() for name in config.outputs if _is_tensor(expected.get(name))}
    renamed = config.torch_to_onnx_input_map
    yield Run({renamed.get(name, name): value.numpy() for name, value in inputs.items()}, wanted)


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds Python's and torch's generators inside, and gives them their states back."""
    import torch

    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            yield
    finally:
        random.setstate(state)
