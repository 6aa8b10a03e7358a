"""The pipeline of a policy file: names of passes, with options."""

from __future__ import annotations

from dmqfx.policy.mark import Mark
from dmqfx.policy.marked import Leaf, Listing, Odd, Section, Tree
from dmqfx.policy.policy import CheckStep, Option, Scalar, Step
from dmqfx.policy.reading import Reader

__all__ = ["read_pipeline", "step_name"]


def step_name(tree: Tree) -> str | None:
    """The pass that a step of the pipeline names, or None if it is not a step."""
    if isinstance(tree, Section) and len(tree.entries) == 1:
        return next(iter(tree.entries))
    return tree.value if isinstance(tree, Leaf) and isinstance(tree.value, str) else None


def read_pipeline(tree: Tree, reader: Reader, check_step: CheckStep | None) -> tuple[Step, ...]:
    """The steps that can be read; what `check_step` has against a step or an option is noted where that stands."""
    steps = []
    for item in reader.listing(tree, "pipeline") or ():
        step = _step(item, reader)
        if step is None:
            continue
        steps.append(step)
        for option, problem in check_step(step.name, step.keywords()).items() if check_step else ():
            reader.note(_mark(item, step, option), problem)
    return tuple(steps)


def _mark(tree: Tree, step: Step, option: str) -> Mark:
    """Where an option of a step was given; the place of the step for what was not."""
    options = tree.get(step.name) if isinstance(tree, Section) else None
    entry = options.entries.get(option) if isinstance(options, Section) else None
    return entry.mark if entry else step.mark


def _step(tree: Tree, reader: Reader) -> Step | None:
    name = step_name(tree)
    if name is None:
        reader.note(
            tree.mark, "pipeline: a step is a name, or one name with its options as in {name: {option: 1}}"
        )
        return None
    if not isinstance(tree, Section):
        return Step(name, (), tree.mark)
    entry = tree.entries[name]
    if not isinstance(entry.value, Section):
        reader.note(entry.value.mark, f"pipeline.{name}: options are a mapping such as {{option: 1}}")
        return None
    options = [
        (key, _option(each.value, f"pipeline.{name}.{key}", reader))
        for key, each in entry.value.entries.items()
    ]
    return Step(name, tuple(sorted(options)), tree.mark)


def _option(tree: Tree, path: str, reader: Reader) -> Option:
    if isinstance(tree, Listing):
        return tuple(_scalar(item, path, reader) for item in tree.items)
    return _scalar(tree, path, reader)


def _scalar(tree: Tree, path: str, reader: Reader) -> Scalar:
    if isinstance(tree, Leaf) and not isinstance(tree.value, Odd):
        return tree.value
    why = (
        f"{tree.value.text}, {tree.value.why}"
        if isinstance(tree, Leaf) and isinstance(tree.value, Odd)
        else "nested"
    )
    reader.note(
        tree.mark, f"{path}: an option is a number, a word, true, false or a flat list of these, not {why}"
    )
    return None
