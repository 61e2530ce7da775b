"""How the chapters stand against the style guide: cells, exported lines, docstrings, demos. A measure of text: it times nothing.

The yardsticks: exported cells have a median of ten lines and stay under 35, lines under 118 columns; every public name has a docstring and
is used in a demo or test of its own notebook.

    python bench/book.py --json
"""
import argparse, json
from dataclasses import asdict
from pathlib import Path
from fada.book import chapter_shape, chapters
from fada.settings import environment

def table(shapes)->str:
    "The chapters as lines, the sum last"
    head = f'{"chapter":18} {"cells":>5} {"median":>6} {"longest":>7} {"> 35":>5} {"wide":>5} {"public":>6} {"no doc":>6} {"no demo":>7}'
    lines = [f'{s.chapter:18} {s.cells:5} {s.median_lines:6.0f} {s.longest_lines:7} {s.over_35:5} {s.wide:5} {s.public:6} {len(s.no_docstring):6} {len(s.no_demo):7}'
             for s in shapes]
    total = lambda k: sum(v if isinstance(v, int) else len(v) for v in (getattr(s, k) for s in shapes))
    return '\n'.join([head, *lines, f'{"all":18} {total("cells"):5} {"":6} {max(s.longest_lines for s in shapes):7} {total("over_35"):5} {total("wide"):5} '
                                    f'{total("public"):6} {total("no_docstring"):6} {total("no_demo"):7}'])

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='the same: it takes seconds'); p.add_argument('--json', action='store_true')
    p.add_argument('--names', action='store_true', help='name what has no docstring or no demo')
    a = p.parse_args(); root = Path(__file__).resolve().parents[1]
    shapes = [chapter_shape(c, root/'fada') for c in chapters(root/'nbs') if c.module]
    public = sum(s.public for s in shapes); share = lambda k: round(1-sum(len(getattr(s, k)) for s in shapes)/public, 4)
    if a.json:
        return print(json.dumps(dict(ratios=dict(with_docstring=share('no_docstring'), with_demo=share('no_demo')), baseline='all public functions and classes',
                                     chapters=[asdict(s) for s in shapes], machine=environment(), versions=environment()), indent=1))
    print(table(shapes)); print(f'docstring: {share("no_docstring"):.1%}, demo or test in its own notebook: {share("no_demo"):.1%} of {public}')
    if a.names:
        for s in shapes:
            for what,names in (('no docstring', s.no_docstring), ('no demo', s.no_demo)):
                if names: print(f'{s.chapter}: {what}: {", ".join(names)}')

if __name__ == '__main__': main()
