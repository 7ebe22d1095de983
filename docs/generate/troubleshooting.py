"""Write docs/troubleshooting.md: every problem that the doctor knows, as it reports it.

    python docs/generate/troubleshooting.py

Each problem is shown to the doctor as an environment that has it (doctor_cases.py); the page says what the doctor
says.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from doctor_cases import CASES  # noqa: E402

from mmattn.doctor import examine  # noqa: E402
from tools.setup_env import hint  # noqa: E402

PAGE = ROOT / 'docs/troubleshooting.md'

# What a step of `make setup` prints when it fails, one for each entry of HINTS in tools/setup_env.py.
FAILED_STEPS = (
    'The virtual environment was not created successfully because ensurepip is not available.',
    'OSError: [Errno 28] No space left on device',
    'fatal error: Python.h: No such file or directory',
    'OSError: CUDA_HOME environment variable is not set.',
    'g++: fatal error: Killed signal terminated program cc1plus',
    "error: command 'x86_64-linux-gnu-g++' failed: No such file or directory",
    'ERROR: Could not find a version that satisfies the requirement torch==2.13.0',
)

HEADER = """\
# Troubleshooting

    python -m mmattn.doctor

looks at the environment, says what is wrong, and prints the command that mends it. `--json` prints the same for
programs. It needs nothing but Python. **fail** means that training a detector cannot run, **warn** that something
of lesser weight is wrong. Mend in the order in which the doctor names things: a later problem is often an
earlier one's.

This page is made from the doctor: each problem that it knows, what it says, and what it prints to mend it.
Versions and paths are examples; the doctor prints yours.
"""
SETUP = """
## `make setup` stops

It shows the end of the failed step's log, and says what to do. The same command then goes on from there.

| in the log | what to do |
|---|---|"""


def look(environment, name):
    """What the doctor says of an environment, in one of its checks."""
    return next(check for check in examine(environment) if check.name == name)


def page():
    """Text of docs/troubleshooting.md."""
    lines = []
    for title, name, environment in CASES:
        check = look(environment, name)
        lines += ['', f'## {title}', '', f'    {check.state}  {check.name}: {check.found}', '']
        lines += ['To mend it:', '', f'    {check.mend}'] if check.mend else ['Nothing to mend.']
    lines.append(SETUP)
    lines += [f'| `{log}` | {hint(log)} |' for log in FAILED_STEPS]
    return HEADER + '\n'.join(lines) + '\n'


def main():
    PAGE.write_text(page())
    print(f'wrote {PAGE.relative_to(ROOT)}')


if __name__ == '__main__':
    main()
