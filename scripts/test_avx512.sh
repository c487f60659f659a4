#!/usr/bin/env bash
# Runs tests/native/smoke.cpp with the AVX-512 kernels, as they are compiled, on a processor without AVX-512: Bochs
# emulates a whole machine, instruction by instruction, in which Linux starts and runs that one program.
#
#   BOCHS=bochs KERNEL=/boot/vmlinuz-... bash scripts/test_avx512.sh [INSTRUCTION SET...]     # default: avx512
#
# Bochs must be 3.0 or newer, configured with --enable-evex (2.7 states sizes of AVX-512's registers that Linux refuses).
# KERNEL is any kernel with a serial console built in, such as that of Debian's linux-image-cloud-amd64. Beside them, on
# Debian: apt install bochsbios vgabios isolinux syslinux-common genisoimage busybox-static cpio.
# Takes about a hundred times what the program takes: for AVX-512 some 20 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."

BOCHS="${BOCHS:-bochs}"
KERNEL="${KERNEL:?names a Linux kernel, such as /boot/vmlinuz-6.1.0-50-cloud-amd64}"
LIMIT="${LIMIT:-7200}"  # seconds
[ $# -gt 0 ] || set -- avx512
folder="$PWD/build/bochs"
mkdir -p "$folder"

echo "== a program that needs no library"
cmake -S . -B "$folder/program" -G Ninja -DFASTATTN_PYTHON=OFF -DFASTATTN_SMOKE=ON -DFASTATTN_WERROR=ON \
  -DCMAKE_EXE_LINKER_FLAGS="-static -s" >"$folder.log" 2>&1 || { cat "$folder.log" >&2; exit 1; }
ninja -C "$folder/program" --quiet

echo "== a disk with Linux and that program"
rm -rf "$folder/root" "$folder/disk" "$folder/console.txt"
mkdir -p "$folder"/root/{bin,proc,dev} "$folder/disk/isolinux"
cp /bin/busybox "$folder/program/fastattn_smoke" "$folder/root/bin"
cat >"$folder/root/init" <<INIT
#!/bin/busybox sh
/bin/busybox mount -t proc none /proc
/bin/busybox grep -m1 'model name' /proc/cpuinfo
/bin/fastattn_smoke $*
echo "status \$?"
/bin/busybox poweroff -f
INIT
chmod +x "$folder/root/init"
(cd "$folder/root" && find . | cpio --quiet -o -H newc | gzip >"$folder/disk/initrd.gz")
cp "$KERNEL" "$folder/disk/vmlinuz"
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$folder/disk/isolinux"
printf '%s\n' 'DEFAULT linux' 'LABEL linux' ' KERNEL /vmlinuz' ' INITRD /initrd.gz' \
  ' APPEND console=ttyS0 panic=-1 mitigations=off tsc=reliable no_timer_check quiet' >"$folder/disk/isolinux/isolinux.cfg"
genisoimage -quiet -o "$folder/disk.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot -boot-load-size 4 \
  -boot-info-table "$folder/disk"

echo "== Bochs"
cat >"$folder/machine" <<MACHINE
display_library: nogui
cpu: model=corei7_skylake_x, count=1, ips=50000000, ignore_bad_msrs=1
megs: 1024
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=$folder/disk.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$folder/console.txt
log: $folder/bochs.log
panic: action=fatal
error: action=report
info: action=ignore
MACHINE
timeout --kill-after=20 "$LIMIT" "$BOCHS" -q -f "$folder/machine" >"$folder/bochs.txt" 2>&1 </dev/null &
machine=$!
trap 'kill $machine 2>/dev/null || true' EXIT
until grep -q '^status ' "$folder/console.txt" 2>/dev/null; do
  kill -0 $machine 2>/dev/null || break
  sleep 5
done
cat "$folder/console.txt"
grep -q '^status 0' "$folder/console.txt"
