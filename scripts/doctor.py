"""Tell what this installation has, what it lacks, and the command that mends it.

  python scripts/doctor.py

Looks at Python, the packages, PyTorch and its devices, memory, disk, checkpoints and caches; changes nothing.
Exit codes: 0 a picture can be made, 1 not yet, 2 wrong usage.
"""

import json
import sys
from pathlib import Path

OLDEST = (3, 11)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs where nothing is installed yet


def main() -> int:
    if sys.version_info < OLDEST:
        print(f"missing  python          {sys.version.split()[0]}: install Python 3.11 or newer")
        return 1

    from dataclasses import asdict

    from ldm.doctor import examine, lines, ready
    from ldm.generation.arguments import Parser

    parser = Parser(__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object: ready, and the findings")
    args = parser.parse_args()
    findings = examine()
    if args.json:
        print(json.dumps({"ready": ready(findings), "findings": [asdict(finding) for finding in findings]}))
    else:
        print(*lines(findings), sep="\n")
    return 0 if ready(findings) else 1


if __name__ == "__main__":
    sys.exit(main())
