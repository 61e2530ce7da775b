"""Run the tests of every architecture and keep which passed in fada/assets/ticks.json, from where README and
the page of models take their ticks: python tests/ticks.py (about five minutes; `show`: the table alone)"""

import json, re, subprocess, sys, tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEP = {
    'test_answer': 'answer',
    'test_train_save_merge': 'train',
    'test_train': 'train',
    'test_relevancy': 'attention',
}


def passed(xml) -> dict:
    "{architecture: {step: test name}} of a JUnit file; a step counts where its test passed"
    ticks = {}
    for case in ET.parse(xml).iter('testcase'):
        m = re.fullmatch(r'(\w+)\[(.+?)(?:-(bf16|fp16|int8|nf4))?\]', case.get('name'))
        if not m or any(case.find(k) is not None for k in ('failure', 'error', 'skipped')):
            continue
        test, architecture, precision = m.groups()
        step = precision if test in ('test_half_precision', 'test_quantised') else STEP.get(test)
        if step:
            ticks.setdefault(architecture, {})[step] = case.get('name')
    return ticks


def main():
    with tempfile.TemporaryDirectory() as d:
        subprocess.run(
            [
                sys.executable,
                '-m',
                'pytest',
                '-q',
                '-p',
                'no:cacheprovider',
                f'--junitxml={d}/x.xml',
                'tests/test_families.py',
                'tests/test_planes.py',
                'tests/test_remote.py',
            ],
            cwd=ROOT,
        )
        out = passed(f'{d}/x.xml')
    (ROOT / 'fada' / 'assets' / 'ticks.json').write_text(
        json.dumps(dict(kind='fada ticks', ticks=out), indent=1) + '\n'
    )

    show()


def put_folded(heading, name, summary, table):
    "Put a table into the cell of the index notebook that has `heading` (or says `name`), folded"
    import nbformat

    path = ROOT / 'nbs' / 'index.ipynb'
    nb = nbformat.read(path, 4)
    cell = next(c for c in nb.cells if c.cell_type == 'markdown' and (heading in c.source or c.source == name))
    cell.source = f'<details><summary>{summary}</summary>\n\n{table}\n\n</details>'
    nbformat.write(nb, path)


def show():
    "Put the ticks into the index notebook, from where `make readme` takes them"
    from fada.trial import HEADING, tick_table

    put_folded(HEADING, 'TICKS', 'Which model can do what, and the test that showed it', tick_table())


if __name__ == '__main__':
    show() if sys.argv[1:] == ['show'] else main()
