"""How the chapters stand against the style guide: cells, exported lines, docstrings, demos: text, not time.

The yardsticks: exported cells have a median of ten lines and stay under 35, lines under 118 columns; every public
name has a docstring, and is used in a demo or test of its own notebook, or at least in some notebook or test.

    python bench/book.py --json
"""

import argparse, json, re
from dataclasses import asdict
from pathlib import Path
from fada.book import chapter_shape, chapters, shown_code
from fada.settings import environment

COLUMNS = ('cells', 'median_lines', 'longest_lines', 'over_35', 'wide', 'public', 'no_docstring', 'no_demo')


def count(v):
    return v if isinstance(v, (int, float)) else len(v)


def table(shapes) -> str:
    "The chapters as lines, the sum last"
    line = lambda name, values: f'{name:18}' + ''.join(f'{v:>14}' for v in values)
    total = [sum(count(getattr(s, k)) for s in shapes) if 'lines' not in k else '' for k in COLUMNS]
    rows = [line(s.chapter, [count(getattr(s, k)) for k in COLUMNS]) for s in shapes]
    return '\n'.join([line('chapter', COLUMNS), *rows, line('all', total)])


def never_used(shapes, root) -> list:
    "Public names without a demo in their own notebook that no other notebook's demo, test or bench names either"
    demos = [shown_code(c.path) for d in ('', 'run', 'app', 'tutorials') for c in chapters(root / 'nbs' / d)]
    tests = [p.read_text(encoding='utf-8') for d in ('tests', 'bench') for p in sorted((root / d).glob('*.py'))]
    text = '\n'.join(demos + tests)
    words = set(re.findall(r'\w+', text))
    return [f'{s.chapter}: {n}' for s in shapes for n in s.no_demo if n.split('.')[-1] not in words]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='the same: it takes seconds')
    p.add_argument('--json', action='store_true')
    p.add_argument('--names', action='store_true', help='name what no test and no demo names')
    a = p.parse_args()
    root = Path(__file__).resolve().parents[1]
    shapes = [chapter_shape(c, root / 'fada') for c in chapters(root / 'nbs') if c.module]
    unused = never_used(shapes, root)
    public = sum(s.public for s in shapes)
    share = lambda n: round(1 - n / public, 4)
    ratios = dict(
        with_docstring=share(sum(len(s.no_docstring) for s in shapes)),
        with_demo_in_own_notebook=share(sum(len(s.no_demo) for s in shapes)),
        named_in_some_test_or_demo=share(len(unused)),
    )
    if a.json:
        about = environment()
        return print(
            json.dumps(
                dict(
                    ratios=ratios,
                    baseline=f'{public} public functions, classes and methods',
                    unused=unused,
                    chapters=[asdict(s) for s in shapes],
                    machine=about['machine'],
                    versions=about,
                ),
                indent=1,
            )
        )
    print(table(shapes))
    print(*(f'{k.replace("_", " ")}: {v:.1%} of {public}' for k, v in ratios.items()), sep='\n')
    if a.names:
        print('named in no test and no demo:', *unused, sep='\n  ')


if __name__ == '__main__':
    main()
