"""Write docs/troubleshooting.md: the doctor's table of problems, printed.

python docs/generate/troubleshooting.py
"""

from pathlib import Path

from mmattn._problems import TABLE, Facts, Found, values

PAGE = Path(__file__).parents[1] / 'troubleshooting.md'

HEADER = """\
# Troubleshooting

    python -m mmattn.doctor

checks the environment and prints a remedy for each problem; `--json` prints the same for programs.
It needs nothing but Python. **fail** means that a detector cannot be trained, **warn** is less
serious. Apply the remedies in order: a later problem is often the result of an earlier one.

`make setup` prints the end of a failed step's log and its remedy; the same command continues from
there.

If `import torch` fails with `Failed to load the backend extension: mmattn`, the file
`mmattn_configs.py` was deleted from `site-packages` and the rest of mmattn was not:
`python -m pip uninstall mmattn` removes the rest.

These are all problems that the doctor knows. It prints your versions and packages; NAME, VERSION
and dots stand for them here.

| part | symptom | remedy |
|---|---|---|
"""


def page() -> str:
    """Return the text of docs/troubleshooting.md."""
    parts = {'torch': '2.13.0, CUDA 13.0', 'nvcc': '13.0', 'C++ compiler': 'g++'}
    facts = Facts({name: Found(text) for name, text in parts.items()}, {}, editable=True)
    placeholders = dict(found='VERSION', error='...', missing='NAME')
    rows = []
    for problem in TABLE:
        names = problem.parts.split(', ')
        known = values('mmdet' if 'mmdet' in names else names[0], facts) | placeholders
        symptom, mend = (text.format(**known) for text in (problem.symptom, problem.mend))
        rows.append(f'| {problem.parts} | {symptom} | {mend} |\n')
    return HEADER + ''.join(rows)


if __name__ == '__main__':
    PAGE.write_text(page())
    print(f'wrote {PAGE.name}')
