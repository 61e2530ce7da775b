"""One image, eight questions: the engine against the plain loop, in one run, on the embedded nano.

The baseline is what public pipelines for this task do: one processor call and one `generate` per question. Both give the
same answers, which is asserted. Best of several alternating runs, because machines are noisy.

    python bench/engine.py --quick --json
"""
import argparse, json, sys, time
from fada.clinical import QUESTIONS
from fada.memory import peak_bytes
from fada.phantoms import make_phantom
from fada.settings import environment
from fada.vlm import load, reference_answers

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='fewer repetitions')
    p.add_argument('--json', action='store_true', help='one JSON document on standard output')
    a = p.parse_args()
    vlm = load('blip2-nano'); image = make_phantom('Abdomen', (7, 1, 0)).image; qs = list(QUESTIONS)
    def loop(): return reference_answers(vlm, image, qs)
    def engine(): vlm._features.clear(); return [x.text for x in vlm.ask(image, qs)]
    def cached(): return [x.text for x in vlm.ask(image, qs)]
    ways = dict(loop=loop, engine=engine, cached=cached); best = {k: float('inf') for k in ways}
    answers = {k: f() for k, f in ways.items()}
    assert answers['loop'] == answers['engine'] == answers['cached'], (
        'the ways must agree before their times mean anything')
    for _ in range(3 if a.quick else 10):
        for k, f in ways.items():
            t = time.perf_counter(); f(); best[k] = min(best[k], time.perf_counter()-t)
    out = dict(ratios={'one image, 8 questions': best['loop']/best['engine'],
                       'the same, features cached': best['loop']/best['cached']},
               baseline='one generate per question, same model, same answers',
               seconds=best, peak_bytes=peak_bytes(),
               machine={k: environment()[k] for k in ('system', 'machine', 'cores')}, versions=environment())
    if a.json: print(json.dumps(out, indent=1))
    else:
        print(f"loop {1000*best['loop']:.0f} ms, engine {1000*best['engine']:.0f} ms "
              f"({out['ratios']['one image, 8 questions']:.1f} times as fast), features cached "
              f"{1000*best['cached']:.0f} ms ({out['ratios']['the same, features cached']:.1f} times)")

if __name__ == '__main__': sys.exit(main())
