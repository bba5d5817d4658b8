"""Reads the text of an optimized HLO module: its instructions, and how often a step executes each."""

import dataclasses
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)")
_NAME = re.compile(r"%([\w.\-]+)")
_KNOWN_TRIPS = re.compile(r'known_trip_count"?\s*[:=]\s*\{"?n"?\s*[:=]\s*"?(\d+)')
_CALLED = re.compile(
    r"(?:calls|body|called_computations|branch_computations|true_computation|false_computation)=\{?([%\w.\-, ]+)"
)
_CONTROL_FLOW = ("while", "conditional", "call")
_APPLIED = re.compile(r"to_apply=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of HLO.

    Attributes:
      type: the type of its result, such as `f32[8,4]{1,0}`; in parentheses if there are several.
      operation: such as `all-gather`, `fusion`, `while`.
      rest: the text after `operation(`: operands, then attributes.
      inputs: the types of the operands, one after another.
      fused: the computation of another instruction, such as a fusion, that it is a part of; empty if it is executed by
        itself, in the entry, a loop or a branch.
    """

    name: str
    type: str
    operation: str
    rest: str
    inputs: str = ""
    fused: str = ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """A computation of HLO: instructions by name, in order. `root` is the name of the one that is the result."""

    instructions: dict[str, Instruction]
    root: str


def executed_instructions(text: str, branch_share: float = 1) -> list[tuple[float, Instruction]]:
    """Returns (executions in one run of the module, instruction), those of called computations included.

    A loop whose trips are not known counts once.

    Args:
      branch_share: executions of each branch, for one execution of its conditional.
    """
    computations, entry = _parse(text)

    def walk(name: str, times: float, fused: str) -> Iterator[tuple[float, Instruction]]:
        for instruction in computations[name].instructions.values() if name in computations else ():
            yield times, dataclasses.replace(instruction, fused=fused) if fused else instruction
            inner = times
            if instruction.operation == "while":
                inner = times * _trips(computations, instruction)
            elif instruction.operation == "conditional":
                inner = times * branch_share
            for called in _called(instruction):
                yield from walk(called, inner, fused or ("" if instruction.operation in _CONTROL_FLOW else called))

    return list(walk(entry, 1, ""))


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations by name, and the name of the module's entry."""
    instructions: dict[str, dict[str, Instruction]] = {}
    roots: dict[str, str] = {}
    name = entry = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name, entry = match[2], match[2] if match[1] else entry
            instructions[name] = {}
        elif name and (match := _INSTRUCTION.match(line)):
            block = instructions[name]
            operands = _NAME.findall(match[5].partition(")")[0])
            inputs = " ".join(block[operand].type for operand in operands if operand in block)
            block[match[2]] = Instruction(match[2], match[3], match[4], match[5], inputs)
            if match[1]:
                roots[name] = match[2]
    return {name: Computation(block, roots.get(name, "")) for name, block in instructions.items()}, entry


def _called(instruction: Instruction) -> list[str]:
    """Returns the computations that an instruction executes. An asynchronous one executes them where it starts."""
    if instruction.operation.endswith(("-done", "-update")):
        return []
    names = [name for group in _CALLED.findall(instruction.rest) for name in _NAME.findall(group)]
    return names + (_APPLIED.findall(instruction.rest) if instruction.operation == "call" else [])


def _trips(computations: dict[str, Computation], loop: Instruction) -> int:
    """Returns the trips of a loop: as XLA notes them, or from a counter that the loop compares with a constant."""
    if match := _KNOWN_TRIPS.search(loop.rest):
        return int(match[1])
    condition, body = (computations[_first(rf"{part}=%?([\w.\-]+)", loop.rest)] for part in ("condition", "body"))
    try:
        left, right = _NAME.findall(condition.instructions[condition.root].rest)[:2]
        slot = int(_first(r"index=(\d+)", _source(condition, left).rest))
        results = _NAME.findall(body.instructions[body.root].rest.partition("), ")[0])
        stride = _source(body, _NAME.findall(_source(body, results[slot]).rest)[1])
        limit, step = (int(_first(r"^(\d+)", constant.rest)) for constant in (_source(condition, right), stride))
    except LookupError:
        return 1
    return -(-limit // step)


def _first(pattern: str, text: str) -> str:
    """Returns the first group of the first match.

    Raises:
      LookupError: if there is none.
    """
    match = re.search(pattern, text)
    if match is None:
        raise LookupError(pattern)
    return match[1]


def _source(computation: Computation, name: str) -> Instruction:
    """Returns the instruction that computes a value, before copies."""
    instruction = computation.instructions[name]
    while instruction.operation == "copy":
        instruction = computation.instructions[_NAME.findall(instruction.rest)[0]]
    return instruction
