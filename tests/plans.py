"""Plan every model anew, keep the plans in fada/assets/plans.json, and put table and picture into README:
python tests/plans.py (minutes; `show`: table and picture alone)"""

import json, sys
from dataclasses import asdict
from pathlib import Path
from ticks import put_folded
from fada.plan import all_plans, kept_plans, plan_figure, plan_table

ROOT = Path(__file__).resolve().parents[1]
HEADING = '**predicted: peak in GiB → smallest of 8, 16, 24 and 80 GiB**'


def main():
    kept = [
        {k: v for k, v in asdict(p).items() if k not in ('nearest', 'hours', 'speed')} | dict(hours=None, speed='')
        for p in all_plans()
    ]
    (ROOT / 'fada' / 'assets' / 'plans.json').write_text(
        json.dumps(dict(kind='fada plans', plans=kept), indent=1) + '\n'
    )
    show()


def show():
    "Put the table into the index notebook, from where `make readme` takes it, and draw the picture beside it"
    plan_figure(kept_plans(), ROOT / 'nbs' / 'plan.png')
    put_folded(
        HEADING,
        'PLANS',
        'The same as a table',
        f'{HEADING}\n\n{plan_table(kept_plans())}\n\nA card of 8 GiB holds 8.59 GB, of which 1.40 GiB are kept for '
        'the desktop (~: tight). Left alone, `fada plan` takes the\nwhole step of `fada train`, and says which parts '
        'and whether checkpointing make it fit.',
    )


if __name__ == '__main__':
    show() if sys.argv[1:] == ['show'] else main()
