"""Rebuild the embedded demo sequences from Biopython's source distribution: how they came to be, and how to check it.

    pip download --no-binary :all: --no-deps biopython==1.87
    python -m mambagen.data_manifests.build_demo biopython-1.87.tar.gz FOLDER

writes hg38.fa.gz, panTro5.fa.gz and NC_000932.fa.gz into FOLDER. Letters and their case are those of the sources; names
say the assembly and the coordinates, which the sources give 0-based and half-open (as twoBitToFa takes them).
"""

import gzip
import hashlib
import io
import sys
import tarfile
from pathlib import Path

# Member of the archive's Tests folder -> its sha256 (the same in Biopython 1.86 to 1.88).
SOURCES = {
    "Blat/hg38.fa": "3c58ce1b423d23f0071a8f05683aca249fac02831c66eecf10bd85fd465dd5ef",
    "Blat/panTro5.fa": "0b7df5816408268bad7604c03cdb1db7574252d441df46da66f2aaa7d7447e9a",
    "GenBank/NC_000932.gb": "a8b5d8239001f56a5b8b3ff047b10338b839329cf594aad36bfa4755a0dfb480",
}
# Name of a record in its source -> its name here and what it is.
RECORDS = {
    "chr13:75549820-75605809": ("hg38.chr13_75549820_75605809", "Homo sapiens, hg38 chr13:75549820-75605809, + strand"),
    "chr4:41257605-41263290": ("hg38.chr4_41257605_41263290", "Homo sapiens, hg38 chr4:41257605-41263290, + strand"),
    "chr1:122835700-122907400": (
        "panTro5.chr1_122835700_122907400",
        "Pan troglodytes, panTro5 chr1:122835700-122907400, + strand",
    ),
    "NC_000932.1": ("NC_000932.1", "Arabidopsis thaliana chloroplast, complete genome"),
}


def main(archive: str, folder: str) -> None:
    """Write the three files."""
    from Bio import SeqIO

    with tarfile.open(archive) as tar:
        top = tar.getnames()[0].split("/")[0]
        for source, sha256 in SOURCES.items():
            member = tar.extractfile(f"{top}/Tests/{source}")
            assert member is not None
            content = member.read()
            if hashlib.sha256(content).hexdigest() != sha256:
                sys.exit(f"{source} of {archive} is not the file that the demo was made from")
            kind = "genbank" if source.endswith(".gb") else "fasta"
            lines = []
            for record in SeqIO.parse(io.StringIO(content.decode("ascii")), kind):
                name, what = RECORDS[record.id]
                sequence = str(record.seq)
                lines.append(f">{name} {what}\n")
                lines += [sequence[i : i + 60] + "\n" for i in range(0, len(sequence), 60)]
            target = Path(folder) / (Path(source).stem + ".fa.gz")
            target.write_bytes(gzip.compress("".join(lines).encode("ascii"), compresslevel=9, mtime=0))
            print(target, hashlib.sha256(target.read_bytes()).hexdigest(), sep="\t")


if __name__ == "__main__":
    main(*sys.argv[1:])
