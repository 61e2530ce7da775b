"""Run the tests of every architecture and keep which passed in fada/assets/ticks.json, from where the page of models
takes its ticks: python tests/ticks.py (about five minutes; `show`: the table alone)"""
import json, re, subprocess, sys, tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEP = {'test_answer': 'answer', 'test_train_save_merge': 'train', 'test_train': 'train',
        'test_relevancy': 'attention'}

def passed(xml)->dict:
    "{architecture: {step: test name}} of a JUnit file; a step counts where its test passed"
    ticks = {}
    for case in ET.parse(xml).iter('testcase'):
        m = re.fullmatch(r'(\w+)\[(.+?)(?:-(bf16|fp16|int8|nf4))?\]', case.get('name'))
        if not m or any(case.find(k) is not None for k in ('failure', 'error', 'skipped')): continue
        test, architecture, precision = m.groups()
        step = precision if test in ('test_half_precision', 'test_quantised') else STEP.get(test)
        if step: ticks.setdefault(architecture, {})[step] = case.get('name')
    return ticks

def main():
    with tempfile.TemporaryDirectory() as d:
        subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider',
                        f'--junitxml={d}/x.xml', 'tests/test_families.py', 'tests/test_planes.py',
                        'tests/test_remote.py'], cwd=ROOT)
        out = passed(f'{d}/x.xml')
    (ROOT/'fada'/'assets'/'ticks.json').write_text(json.dumps(dict(kind='fada ticks', ticks=out), indent=1)
                                                   +'\n')

    show()

def put_table(heading, table):
    "Put `table` in the place of the one under a heading of the page of models"
    page = ROOT/'nbs'/'pages'/'models.md'; text = page.read_text(); start = text.index(f'\n## {heading}\n')
    end = text.find('\n## ', start+1); section = text[start:end] if end > 0 else text[start:]
    old = re.search(r'\*\*.*?\*\*\n\n(\|.*\n)+', section)[0]
    page.write_text(text.replace(old, table.rstrip('\n')+'\n'))

def show():
    "Put the ticks into the page of models"
    from fada.trial import tick_table
    put_table('What each can do', tick_table())

if __name__ == '__main__': show() if sys.argv[1:] == ['show'] else main()
