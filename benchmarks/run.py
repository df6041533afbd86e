"""Run every program, one process each, and rewrite RESULTS.md with their tables and the machine."""
import argparse, subprocess, sys
from pathlib import Path
from common import machine, note

HERE = Path(__file__).resolve().parent
PROGRAMS = ['oneshot', 'memory', 'fit', 'accuracy']


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--quick', action='store_true', help='small variants of all programs')
    parser.add_argument('--only', nargs='*', default=PROGRAMS, choices=PROGRAMS)
    parser.add_argument('--out', type=Path, default=HERE/'RESULTS.md')
    args = parser.parse_args()
    parts = ['# Benchmark results\n', f'Written by `benchmarks/run.py{" --quick" if args.quick else ""}`.\n',
             '*A quick run: to see that the programs work, not to quote.*\n' if args.quick else '', machine()]
    failed = []
    for name in args.only:
        note(f'--- {name}')
        result = subprocess.run([sys.executable, HERE/f'{name}.py', *['--quick']*args.quick], stdout=subprocess.PIPE, text=True)
        if result.returncode: failed.append(name)
        parts.append(result.stdout if not result.returncode else f'## {name}\n\n*The program failed.*\n')
        args.out.write_text('\n'.join(p for p in parts if p))  # after each: an interrupted run leaves what it had
    print(args.out.read_text())
    if failed: sys.exit(f'failed: {", ".join(failed)}')


if __name__ == '__main__': main()
