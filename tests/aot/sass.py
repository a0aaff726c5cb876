# SPDX-License-Identifier: Apache-2.0
"""What machine code for NVIDIA GPUs says: whether the loops that matter store and load registers for want of others.

nvdisasm prints one section a kernel, `.L_x_1:` for labels, `/*0040*/  @!P1 BRA `(.L_x_1) ;` for instructions.
"""

import re


def spills_in_main_loops(text: str) -> int | None:
    """How many instructions of main loops spill, over all kernels in `text`; None if it holds no machine code.

    A main loop is one with matrix products and no loop with matrix products inside.
    """
    kernels = re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]
    return sum(map(_of_kernel, kernels)) if kernels else None


def _of_kernel(text: str) -> int:
    code, labels = [], {}
    for label, instruction in re.findall(r"^(\.L_\w+):|/\*[0-9a-f]{4,}\*/\s+([^;\n]*)", text, re.MULTILINE):
        if label:
            labels[label] = len(code)
        else:
            code.append(instruction)
    loops = [loop for loop in _loops(_successors(code, labels)) if any("MMA" in code[i] for i in loop)]
    main = [loop for loop in loops if not any(other < loop for other in loops)]
    return sum(bool(re.search(r"\b(LDL|STL)\b", code[i])) for i in set().union(*main))


def _successors(code: list[str], labels: dict[str, int]) -> list[set[int]]:
    """Which instructions may follow each."""
    successors = []
    for i, instruction in enumerate(code):
        branch, conditional = re.search(r"\bBRA\b.*?\((\.L_\w+)\)", instruction), instruction.startswith("@")
        following = {labels[branch[1]]} if branch else set()
        if conditional or not re.search(r"\b(BRA|EXIT|RET)\b", instruction):
            following.add(i + 1)
        successors.append({j for j in following if j < len(code)})
    return successors


def _loops(successors: list[set[int]]) -> list[set[int]]:
    """The natural loops: where a branch goes back to an instruction that every way to the branch came by. Code that is
    moved out of line, a retry for example, jumps back without being a loop."""
    predecessors: list[set[int]] = [set() for _ in successors]
    for i, following in enumerate(successors):
        for j in following:
            predecessors[j].add(i)
    loops: dict[int, set[int]] = {}
    for end, following in enumerate(successors):
        for start in following:
            if start <= end and not _reaches(successors, 0, end, avoiding=start):
                body = loops.setdefault(start, {start})
                body |= _ancestors(predecessors, end, start)
    return list(loops.values())


def _reaches(successors: list[set[int]], start: int, end: int, avoiding: int) -> bool:
    seen, waiting = {avoiding}, [] if start == avoiding else [start]
    while waiting:
        if (i := waiting.pop()) == end:
            return True
        if i not in seen:
            seen.add(i)
            waiting.extend(successors[i])
    return False


def _ancestors(predecessors: list[set[int]], end: int, start: int) -> set[int]:
    """Instructions from which `end` is reached without passing `start`."""
    seen, waiting = {start}, [end]
    while waiting:
        if (i := waiting.pop()) not in seen:
            seen.add(i)
            waiting.extend(predecessors[i])
    return seen
