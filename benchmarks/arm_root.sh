#!/usr/bin/env bash
# Make the folder that tests/export/test_processors.py runs Arm's Python and onnxruntime from: packages of Debian 12 and of PyPI, unpacked,
# nothing installed but the architecture's name in apt. Needs root for that; `make processors` calls it.
set -euo pipefail
root=$(realpath -m "$1")
python=${2:-python3}
mkdir -p "$root/packages" "$root/site" "$root/proc"
dpkg --add-architecture arm64
apt-get update -qq
cd "$root/packages"
chmod a+w .
apt-get download -qq {libc6,libgcc-s1,libstdc++6,libgomp1,python3.11-minimal,libpython3.11-minimal,libpython3.11-stdlib}:arm64 \
    {libexpat1,zlib1g,libssl3,libffi8,libbz2-1.0,liblzma5,libcrypt1,libuuid1}:arm64
for package in *.deb; do dpkg-deb -x "$package" "$root"; done
versions=$("$python" -c 'import numpy, onnxruntime as o; print(f"numpy=={numpy.__version__} onnxruntime=={o.__version__}")')
platforms=$(printf -- '--platform manylinux_2_%s_aarch64 ' 17 27 28)
# shellcheck disable=SC2086
"$python" -m pip download -q --no-deps --only-binary=:all: $platforms --python-version 3.11 -d . $versions
for wheel in *.whl; do "$python" -m zipfile -e "$wheel" "$root/site"; done
# qemu shows this file in place of the machine's own, which onnxruntime's library of processors cannot read as one of Arm.
features="fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
for cpu in 0 1; do
    printf 'processor\t: %s\nFeatures\t: %s\nCPU implementer\t: 0x41\nCPU architecture: 8\n' "$cpu" "$features"
    printf 'CPU variant\t: 0x3\nCPU part\t: 0xd0c\nCPU revision\t: 1\n\n'
done > "$root/proc/cpuinfo"
