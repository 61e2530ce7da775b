"""Scoring 150,000 answers with 1,000 bootstrap draws that draw patients: reading free text, scores and what stands
beside them, controls, per category, a paired comparison with its permutation test. Beside it, per draw, the
bootstrap written plainly (patients drawn and their rows put together anew); both give the same interval.

    python bench/metrics.py --quick --json
"""

import argparse, json, time
import numpy as np
import pandas as pd
from fada.clinical import CATEGORIES, QUESTIONS, RECOMMENDATIONS, STRUCTURES, phrase_answer
from fada.controls import majority, summary
from fada.metrics import primary, score_table
from fada.scores import question_scores
from fada.settings import environment, progress
from fada.stats import mean_interval, permutation_test


def answer(rng, q, category):
    "A structured answer, drawn"
    pick = lambda x: x[rng.integers(len(x))]
    if q == 1:
        return dict(structures=[s for s in STRUCTURES if rng.random() < 0.12])
    if q == 2:
        return dict(axis=pick(['axial', 'longitudinal', 'sagittal']), spine=pick(['left', 'right', 'up', 'down']))
    if q == 3:
        return dict(plane=category.plane, standard=bool(rng.random() < 0.6))
    if q == 4:
        return dict(
            parameters=list(category.biometry),
            mm={p: float(rng.uniform(20, 300)) for p in category.biometry if p in ('FL', 'AC', 'HC')},
        )
    if q == 5:
        w = int(rng.integers(12, 38))
        return dict(weeks=[w, w + int(rng.integers(1, 5))])
    if q == 6:
        return dict(grade=pick(['poor', 'moderate', 'good']), reasons=[])
    if q == 7:
        return dict(normal=True, findings=[]) if rng.random() < 0.95 else dict(normal=False, findings=['short femur'])
    return {'class': pick(list(RECOMMENDATIONS))}


def made(images, seed=0):
    "A table of answers, four images a patient: nine in ten of the answers right, in one of three wordings"
    rng = np.random.default_rng(seed)
    names = list(CATEGORIES.values())
    rows = []
    for i in range(images):
        c = names[i % len(names)]
        for q in QUESTIONS:
            t = answer(rng, q, c)
            said = t if rng.random() < 0.9 else answer(rng, q, names[rng.integers(len(names))])
            rows.append(
                (
                    f'{i}.png',
                    c.name,
                    f'P{i // 4}',
                    q,
                    phrase_answer(q, t),
                    json.dumps(t),
                    phrase_answer(q, said, int(rng.integers(3))),
                    rng.random(),
                )
            )
    return pd.DataFrame(
        rows,
        columns=['image', 'category', 'patient', 'question_id', 'answer', 'structured', 'prediction', 'confidence'],
    ).assign(error='', question='', condition='plain')


def plainly(scores, patients, draws, seed=0):
    "The clustered bootstrap as one would first write it"
    rng = np.random.default_rng(seed)
    groups = [g.to_numpy() for _, g in pd.Series(scores).groupby(np.asarray(patients))]
    return np.quantile(
        [np.concatenate([groups[k] for k in rng.integers(0, len(groups), len(groups))]).mean() for _ in range(draws)],
        [0.025, 0.975],
    )


def main():
    p = argparse.ArgumentParser()
    p.add_argument('--quick', action='store_true')
    p.add_argument('--json', action='store_true')
    p.add_argument('--answers', type=int)
    a = p.parse_args()
    n = (a.answers or (16_000 if a.quick else 150_000)) // 8
    table = made(n)
    steps = {}

    def step(name, work):
        t = time.perf_counter()
        out = work()
        steps[name] = round(time.perf_counter() - t, 2)
        bar.update()
        return out

    bar = progress(None, 'scoring', total=6, unit='step')
    start = time.perf_counter()
    plain = step('read and score', lambda: score_table(table))
    rows = step(
        'majority answer', lambda: pd.concat([plain, score_table(majority(table, table, False))], ignore_index=True)
    )
    step('scores beside', lambda: question_scores(plain))
    step('controls with intervals', lambda: summary(rows))
    step('per category', lambda: {c: summary(g) for c, g in rows.groupby('category')})
    other = plain.score.to_numpy()[np.random.default_rng(1).permutation(len(plain))]
    step('paired comparison', lambda: (primary(plain, other), permutation_test(plain.score, other, plain.patient)))
    seconds = time.perf_counter() - start
    bar.close()
    t = time.perf_counter()
    ours = mean_interval(plain.score, plain.patient, seed=9)
    fast = time.perf_counter() - t
    few = 20 if a.quick else 50
    t = time.perf_counter()
    plainly(plain.score, plain.patient, few)
    slow = (time.perf_counter() - t) / few * 1000
    ref = plainly(plain.score[:8000], plain.patient[:8000], 1000)
    mine = mean_interval(plain.score[:8000], plain.patient[:8000])
    assert np.abs(ref - [mine['low'], mine['high']]).max() < 0.25 * (ref[1] - ref[0]), (ref, mine)
    out = dict(
        answers=len(plain),
        patients=int(plain.patient.nunique()),
        draws=1000,
        seconds=round(seconds, 2),
        steps=steps,
        answers_per_second=round(len(plain) / seconds),
        interval=ours,
        ratios=dict(bootstrap_against_plainly=round(slow / fast, 1)),
        baseline='the clustered bootstrap with rows put together for each draw, extrapolated to 1,000 draws',
        machine={k: environment()[k] for k in ('system', 'machine', 'cores')},
        versions=environment(),
    )
    if a.json:
        print(json.dumps(out, indent=1, default=str))
    else:
        print(
            f"{out['answers']:,} answers of {out['patients']:,} patients, 1,000 draws: {seconds:.1f} s ({', '.join(f'{k} {v} s' for k, v in steps.items())})"
        )
        print(f"bootstrap: {out['ratios']['bootstrap_against_plainly']} times faster than put together for each draw")


if __name__ == '__main__':
    main()
