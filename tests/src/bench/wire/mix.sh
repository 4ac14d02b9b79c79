#!/bin/busybox sh
# The first process of a guest of `bench wire`; `mix=…` on the kernel's command line says which load it is.
# Says READY when the load is under way.
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mount -t tmpfs tmpfs /tmp
/bin/busybox --install -s /bin
exec </dev/console >/dev/console 2>&1

# Serves a tree of headers, libraries and documents to a client on the same machine; each eighth answer is packed and kept.
files() {
  ifconfig lo 127.0.0.1 up
  httpd -p 80 -h /srv/files
  cd /srv/files && find . -type f > /list
  lines=$(wc -l < /list) n=0
  mkdir -p /srv/up
  while :; do
    file=$(sed -n "$((RANDOM % lines + 1))p" /list)
    wget -q -O /tmp/got "http://127.0.0.1/$file" || echo "W $file"
    [ $((n % 8)) = 0 ] && gzip -c /tmp/got > /srv/up/$((n % 512)).gz
    n=$((n + 1))
    [ $n = 50 ] && echo READY
  done
}

# Compiles and assembles zstd's sources, over and over.
compile() {
  cd /src/compress && n=0
  while :; do
    for file in *.c; do
      cc1 -quiet -O1 -imultiarch x86_64-linux-gnu -I/gcc $file -o /tmp/x.s && as /tmp/x.s -o /tmp/${file%.c}.o || echo "W $file"
      n=$((n + 1))
      [ $n = 2 ] && echo READY
    done
  done
}

# Transactions of inserts and updates on random rows, and queries, by a sqlite3 with a cache of 24 MB and a write-ahead log.
database() {
  (
    cat /sql/make
    echo '.print READY'
    while :; do cat /sql/step && sleep 0.1; done
  ) | sqlite3 /tmp/db > /tmp/out
}

# The database's READY is a line of its output.
[ "$mix" = database ] && (until grep -q READY /tmp/out; do sleep 0.2; done; echo READY) &
$mix
echo "W $mix has ended"
