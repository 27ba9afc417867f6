#!/bin/sh
# enter.sh ROOT CACHE COMMAND [FOLDER...]: run COMMAND with ROOT as the root file system.
#
# Started by unshare(1) with new mount, pid, ipc and uts namespaces, so it is process 1 and whatever
# is left when it ends is killed. pivot_root(2) takes the host's file systems away altogether, where
# a chroot could be left again by root. FOLDERs are seen read-only under their own paths; CACHE
# holds downloads of apt and pip.
set -eu
root=$1 cache=$2 command=$3
shift 3

mount --make-rprivate /
mount --bind "$root" "$root"
cd "$root"
mkdir -p proc sys dev run tmp root/.cache/pip var/cache/apt/archives

mount -t proc proc proc
# With its control groups, which belong to the kernel.
mount --rbind /sys sys
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/pts dev/shm
for device in null zero full random urandom tty; do
	: > "dev/$device"
	mount --bind "/dev/$device" "dev/$device"
done
mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ln -s fd/0 dev/stdin
ln -s fd/1 dev/stdout
ln -s fd/2 dev/stderr
mount -t tmpfs -o mode=755 tmpfs run
mount --bind "$cache/pip" root/.cache/pip
mount --bind "$cache/debs" var/cache/apt/archives
for folder in "$@"; do
	mkdir -p ".$folder"
	mount --bind -o ro "$folder" ".$folder"
done

mkdir -p .host
pivot_root . .host
umount -l /.host
rmdir /.host
hostname safe-exec-test
# Process 1 stays this shell: it takes in the processes whose parents are gone.
chroot . /bin/sh -c "$command"
