"""Maps of where an answer depended on the image, against what is known to be there: methods and controls on
phantoms.

The baseline is the best of the controls: an even map, one that rises towards the middle, the sector, and the same
method on random weights. Samples are pairs of phantoms that differ in one structure, kept where leaving it out
makes the words that name it less likely. The time of a map is told as a multiple of the time of the answer.

    python bench/attention.py --quick --json
"""

import argparse, json, os, sys, time

os.environ.setdefault('OMP_NUM_THREADS', '1')
from fada.checked import METHODS, SCORES, check_maps, controls_of, map_table, verdicts
from fada.clinical import DEMO_CATEGORIES
from fada.explain import keep_verdicts
from fada.heads import look
from fada.maps import relevancy_map
from fada.memory import peak_bytes
from fada.metrics import mean_interval
from fada.phantoms import make_phantom
from fada.settings import FadaError, environment
from fada.vlm import load


def times(vlm, runs=5) -> dict:
    "CPU seconds of an answer, and of maps of all its tokens; best of several, alternating"
    image = make_phantom('Abdomen', (3, 4, 0)).image
    words = vlm.ask(image, 1).text
    best = {}

    def ask():
        vlm._features.clear()
        vlm.ask(image, 1)

    todo = {
        'answer': ask,
        'relevancy': lambda: relevancy_map(vlm, image, 1, words),
        'raw attention': lambda: look(vlm, image, 1, words),
    }
    for _ in range(runs):
        for k, run in todo.items():
            t = time.process_time()
            run()
            best[k] = min(best.get(k, 9e9), time.process_time() - t)
    return best


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='two categories, three pairs each: too few for a verdict')
    p.add_argument('--json', action='store_true', help='one JSON document on standard output')
    p.add_argument('--model', default='blip2-nano')
    p.add_argument('--weights', help='folder of a model trained here')
    p.add_argument('--adapter', help='folder of an adapter trained here')
    p.add_argument('--patients', type=int, help='pairs in each category (6)')
    p.add_argument(
        '--method',
        action='append',
        choices=METHODS,
        metavar='NAME',
        help='one of: ' + '; '.join(METHODS) + '. Again for more; all, where none is named',
    )
    p.add_argument(
        '--keep',
        nargs='?',
        const='',
        help='keep the verdicts for panel and report; a folder, else where FADA keeps what it knows of models',
    )
    a = p.parse_args()
    if a.quick and a.keep is not None:
        p.error('--quick is too little for a verdict to keep')
    try:
        vlm = load(a.model, a.adapter, a.weights, device='cpu', precision='fp32')
        t = times(vlm)
        scores, counts = check_maps(
            vlm,
            DEMO_CATEGORIES[:2] if a.quick else DEMO_CATEGORIES,
            a.patients or (3 if a.quick else 6),
            seed=7,
            methods={m: METHODS[m] for m in a.method or METHODS},
        )
    except FadaError as e:
        print(e, file=sys.stderr)
        return 1
    if a.keep is not None:
        print(f'kept in {keep_verdicts(vlm, scores, counts, a.keep or None)}', file=sys.stderr)
    found = verdicts(scores)
    mean = scores.groupby('what')[list(SCORES)].mean()
    ratios = {}
    for m in found:
        for s in SCORES:
            rest = mean.loc[list(controls_of(m)), s]
            best = float(rest.min() if s.startswith('deletion') else rest.max())
            ratios[f'{m}: {s} to the best control'] = float(mean.loc[m, s]) / best if best else None
    ratios.update({f'{k}: time to the answer': t[k] / t['answer'] for k in ('relevancy', 'raw attention')})
    out = dict(
        model=vlm.spec.name,
        ratios=ratios,
        baseline='the best control of each method',
        counts=counts,
        verified=[m for m, miss in found.items() if not miss],
        not_beaten={m: [list(x) for x in miss] for m, miss in found.items()},
        seconds=t,
        peak_bytes=peak_bytes(),
        scores={w: {s: mean_interval(v[s], v.patient) for s in SCORES} for w, v in scores.groupby('what')},
        machine={k: environment()[k] for k in ('system', 'machine', 'cores')},
        versions=environment(),
    )
    if a.json:
        print(json.dumps(out, indent=1))
    else:
        print(
            map_table(scores, counts)
            + '\n\n'
            + ', '.join(f'{k} {v:.2f}' for k, v in ratios.items() if 'time' in k)
            + ' times the answer'
        )


if __name__ == '__main__':
    sys.exit(main())
