"""Plan every model anew, keep the plans in fada/assets/plans.json, and put the table into the page of models:
python tests/plans.py (minutes; `show`: table and picture alone)"""
import json, sys
from dataclasses import asdict
from pathlib import Path
from ticks import put_table
from fada.plan import all_plans, kept_plans, plan_figure, plan_table

ROOT = Path(__file__).resolve().parents[1]
HEADING = '**predicted: peak in GiB → smallest of 8, 16, 24 and 80 GiB**'

def main():
    kept = [{k: v for k, v in asdict(p).items() if k not in ('nearest', 'hours',
                                                             'speed')} | dict(hours=None, speed='')
            for p in all_plans()]
    (ROOT/'fada'/'assets'/'plans.json').write_text(json.dumps(dict(kind='fada plans', plans=kept), indent=1)+'\n')
    show()

def show():
    "Put the table into the page of models, and draw README's picture"
    plan_figure(kept_plans(), ROOT/'nbs'/'plan.png')
    put_table('What each needs', f'{HEADING}\n\n{plan_table(kept_plans())}')

if __name__ == '__main__': show() if sys.argv[1:] == ['show'] else main()
