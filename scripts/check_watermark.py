"""Tell which pictures carry the invisible watermark.

Prints a line a picture: its path, the text found and the method that wrote it, with tabs between. Exits with 0 if every
picture carries the text, 1 if one does not or cannot be read, 2 on wrong usage.
"""

import sys

from ldm.generation.arguments import Parser
from ldm.generation.options import WATERMARKS


def parse(argv: list[str] | None = None):
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="a picture")
    parser.add_argument("--text", help=f"the watermark to look for (default: {' or '.join(WATERMARKS)})")
    options = parser.parse_args(argv)
    if options.text == "":
        parser.error("--text must not be empty")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    texts = [options.text] if options.text else WATERMARKS

    # Loaded only now, so that --help answers at once.
    from ldm.errors import ImageError, LdmError
    from ldm.image.io import read_image
    from ldm.image.watermark import read_watermark

    def carries(path: str) -> bool:
        try:
            image = read_image(path)
            found = next(filter(None, (read_watermark(image, text) for text in texts)), None)
        except ImageError as error:
            print(error, file=sys.stderr)
            return False
        print(path, found.text if found else "no watermark", found.method if found else "-", sep="\t")
        return found is not None

    try:
        missing = sum(not carries(path) for path in options.files)
        return 1 if missing else 0
    except LdmError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
