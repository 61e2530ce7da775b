"""The same phantom questions through every back end, in one run: a local model, `transformers serve` with that
model, a door in front of it that fails three times in ten (both protocols), rewrites that invent, two
ensembles. Equal answers are asserted before any time is told.

    python bench/remote.py --quick --json
"""

import argparse, json, sys, tempfile, time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / 'tests'))
from adversarial import attacks, paraphrases
from services import Door, TransformersServe
from test_remote import as_llava
from tiny import tiny
from fada.clinical import QUESTIONS
from fada.ensemble import Ensemble
from fada.phantoms import make_phantom
from fada.refine import judge
from fada.registry import model_spec
from fada.settings import environment
from fada.vlm import Request, load

LONGEST = 12  # tokens of an answer


def asked(images):
    return [Request(im, list(QUESTIONS), k) for k, im in enumerate(images)]


def timed(vlm, images):
    "(answers, seconds)"
    start = time.perf_counter()
    said = list(vlm.answer(asked(images)))
    return said, time.perf_counter() - start


remote = partial(as_llava, max_new_tokens=LONGEST)  # the service with the prompt of the local model


def faulty(serve, images, true, out, sdk):
    "Through a door that fails three times in ten: what was asked, answered, taken"
    d = Door(serve, faults=0.3, seed=4, late=2.0)
    try:
        vlm = remote(d, out, sdk, remote_timeout=1)
        said, seconds = timed(vlm, images)
        n = len(d.log)
        again = timed(remote(d, out, sdk), images)[0]
        assert [a.text for a in said] == [a.text for a in again] == true
        return dict(
            seconds=seconds,
            requests=n,
            faults=n - len(d.answered),
            requests_for_all_again=len(d.log) - n,
            answered=len(d.answered),
            answered_twice=len(d.answered) - len(set(d.answered)),
            tokens=int(vlm.journal.took.sum()),
            guessed_tokens=sum(a.more['guessed'] for a in said),
            cost_usd=round(sum(a.more['cost'] for a in said), 6),
        )
    finally:
        d.close()


def rewrites(n):
    "How many rewrites that add something pass, and how many fair ones"
    bad = [judge(t, a, q).accepted for q, t, a in attacks(n)]
    new = attacks(n, 9)
    fair = [judge(t, a, q).accepted for q, t, a in paraphrases(300)]
    start = time.perf_counter()
    [judge(t, a, q) for q, t, a in new]
    seconds = time.perf_counter() - start
    return dict(rewrites=n, added_to=sum(bad), fair=len(fair), fair_passed=sum(fair), judged_per_second=n / seconds)


def ensembles(serve, images, out):
    "By question and by vote: answers, and parts kept with each"
    nano, row = load('blip2-nano'), model_spec('ensemble')

    class Front:
        url = serve.url[:-3]

    far = remote(Front, out, checkpoint=serve.model)
    made = dict(
        by_question=Ensemble(row, dict(eyes=nano, rest=far), route=dict(structures='eyes', others='rest')),
        vote=Ensemble(row, dict(here=nano, there=far), votes=dict(here=2, there=1)),
    )
    result = {}
    for name, e in made.items():
        said, seconds = timed(e, images)
        parts = [len(a.more['parts']) for a in said]
        assert not any(a.error for a in said) and set(parts) == {1 if name == 'by_question' else 2}
        result[name] = dict(answers=len(said), parts_kept=sum(parts), seconds=seconds)
    return result


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='two images in place of five')
    p.add_argument('--json', action='store_true', help='one JSON document on standard output')
    a = p.parse_args()
    shown = ('Femur', 'Abdomen', 'Thorax', 'Standard_NT', 'Cervix')[: 2 if a.quick else 5]
    images = [make_phantom(c, (k, 1, 0)).image for k, c in enumerate(shown)]
    out = Path(tempfile.mkdtemp())
    weights = tiny('llava', out)[2]
    local = load('llava-1.5-7b', weights=weights, device='cpu', precision='fp32', max_new_tokens=LONGEST)
    timed(local, images[:1])
    said, here = timed(local, images)
    true = [x.text for x in said]
    serve = TransformersServe(weights)
    try:

        class Front:
            url = serve.url[:-3]

        there, far = timed(remote(Front, out / 'serve', checkpoint=serve.model), images)
        assert [x.text for x in there] == true
        faults = {sdk: faulty(serve, images, true, out / sdk, sdk) for sdk in ('openai', 'anthropic')}
        joined = ensembles(serve, images, out / 'ensembles')
    finally:
        serve.close()
    words = rewrites(500)
    result = dict(
        ratios={
            'serve to local, seconds': far / here,
            'three faults in ten to none, seconds': faults['openai']['seconds'] / far,
        },
        baseline='the same tiny LLaVA in this process, batched; all answers equal',
        questions=len(true),
        different_answers=len(set(true)),
        seconds=dict(local=here, serve=far),
        faults=faults,
        refine=words,
        ensembles=joined,
        machine={k: environment()[k] for k in ('system', 'machine', 'cores')},
        versions=environment(),
    )
    if a.json:
        print(json.dumps(result, indent=1))
        return
    print(
        f"{len(true)} questions ({len(set(true))} different answers): local {here:.1f} s, serve {far:.1f} s, equal answers"
    )
    for sdk, f in faults.items():
        print(
            f"{sdk}: {f['requests']} requests, {f['faults']} faults, {f['answered']} answers (two prove vision), "
            f"{f['answered_twice']} of them twice, equal to the local ones, {f['requests_for_all_again']} requests "
            f"to ask all again, {f['tokens']:,} tokens ({f['guessed_tokens']} not confirmed), {f['cost_usd']} USD "
            f"at this bench's price, {f['seconds']:.1f} s"
        )
    print(
        f"{words['rewrites']} rewrites that add: {words['added_to']} pass; {words['fair_passed']} of "
        f"{words['fair']} fair ones pass; {words['judged_per_second']:.0f} judged a second"
    )
    print('; '.join(f"{k}: {v['answers']} answers, {v['parts_kept']} parts kept" for k, v in joined.items()))


if __name__ == '__main__':
    sys.exit(main())
