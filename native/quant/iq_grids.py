"""Write iq_grids.h, the codebooks of the IQ2 and IQ3 formats, from those of the `gguf` package.

Usage: python iq_grids.py > iq_grids.h
"""

import gguf.quants

TYPES = ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]
NUMBERS_PER_LINE = 14

HEADER = """\
/* Codebooks of the IQ2 and IQ3 formats; written by iq_grids.py. A point is packed into 16 bits,
 * first element lowest: eight elements of two bits or four of three, each the index of a magnitude.
 */
#ifndef DG_QUANT_IQ_GRIDS_H
#define DG_QUANT_IQ_GRIDS_H

#include <stdint.h>
"""


def packed_points(name: str) -> tuple[list[int], list[int]]:
    """Return the magnitudes of a format and the packed points of its codebook."""
    quant = getattr(gguf.quants, name)
    quant.init_grid()
    magnitudes = [int(value) for value in quant.grid_map]
    bits = 2 if len(magnitudes) == 3 else 3
    points = [
        sum(magnitudes.index(int(value)) << (bits * i) for i, value in enumerate(point))
        for point in quant.grid.reshape(quant.grid_shape)
    ]
    return magnitudes, points


def main() -> None:
    """Print the header."""
    print(HEADER)
    for name in TYPES:
        magnitudes, points = packed_points(name)
        values = ", ".join(map(str, magnitudes))
        print(f"static const uint8_t {name.lower()}_magnitudes[] = {{{values}}};")
        print(f"static const uint16_t {name.lower()}_grid[{len(points)}] = {{")
        for start in range(0, len(points), NUMBERS_PER_LINE):
            line = points[start : start + NUMBERS_PER_LINE]
            print("    " + " ".join(f"0x{point:04x}," for point in line))
        print("};\n")
    print("#endif")


if __name__ == "__main__":
    main()
