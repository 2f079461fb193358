# shellcheck shell=bash
# What the service scripts share: source it, then call svc_main "$@".
#
# A script sets SVC (its name) and SVC_VERSION and defines
#   svc_install   puts the software under $SVC_HOME; safe to repeat
# and, for a server,
#   svc_launch    starts it with svc_spawn
#   svc_ready     exit 0 once it answers
#   svc_address   prints what a client needs
#
# Everything listens on loopback only and lives under $SERVICES_DIR. No root, no daemon of the
# system, no container. Environment:
#   SERVICES_DIR     default ~/.cache/millrace-services
#   START_TIMEOUT_S  limit on a start (120)      STOP_TIMEOUT_S  on a clean stop (20)
#   LOG_MAX_BYTES    a log is rotated past this (5 MiB, one old copy)
set -euo pipefail

SERVICES_DIR=${SERVICES_DIR:-$HOME/.cache/millrace-services}
START_TIMEOUT_S=${START_TIMEOUT_S:-120}
STOP_TIMEOUT_S=${STOP_TIMEOUT_S:-20}
LOG_MAX_BYTES=${LOG_MAX_BYTES:-5242880}
SVC_HOST=127.0.0.1

say() { printf '%s: %s\n' "${SVC:-service}" "$*" >&2; }
die() { say "error: $*"; exit 1; }
need() { command -v "$1" >/dev/null 2>&1 || die "needs '$1' on PATH${2:+ ($2)}"; }

# ---- processes --------------------------------------------------------------------------------

# Start time of a live process in clock ticks: tells a recycled pid from ours. Nothing for a process
# that is gone or only waits to be reaped.
proc_born() { sed 's/^.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 !~ /[ZX]/ { print $20 }'; }

# Prints the pid of the running server, or fails.
svc_pid() {
  local pid born
  [ -f "$SVC_HOME/pid" ] || return 1
  read -r pid born <"$SVC_HOME/pid" || return 1
  [ -n "${born:-}" ] && [ "$(proc_born "$pid")" = "$born" ] || return 1
  printf '%s\n' "$pid"
}

# svc_spawn CMD...: in a session of its own, log bounded, pid recorded.
svc_spawn() {
  local log=$SVC_HOME/log
  mkdir -p "$SVC_HOME"
  # shellcheck disable=SC2016
  setsid "$@" </dev/null > >(exec setsid perl -e '
    my ($f, $max) = @ARGV; my $n = 0; my $buf;
    open(my $o, ">", $f) or die "$f: $!";
    while (my $r = sysread(STDIN, $buf, 65536)) {
      if ($n + $r > $max) { close $o; rename $f, "$f.1"; open($o, ">", $f) or die; $n = 0 }
      syswrite $o, $buf; $n += $r;
    }' "$log" "$LOG_MAX_BYTES" >/dev/null 2>&1) 2>&1 &
  local pid=$!
  printf '%s %s\n' "$pid" "$(proc_born "$pid")" >"$SVC_HOME/pid"
}

# Something listens on that port of loopback.
port_open() { (exec 3<>"/dev/tcp/$SVC_HOST/$1") 2>/dev/null; }

svc_start() {
  local t0=$SECONDS pid port
  mkdir -p "$SVC_HOME"
  exec 9>"$SVC_HOME/lock"
  flock -w "$START_TIMEOUT_S" 9 || die "another start or stop is under way"
  if svc_pid >/dev/null && svc_ready; then svc_address; return 0; fi
  svc_installed || svc_install
  if ! svc_pid >/dev/null; then
    for port in ${SVC_PORTS:-}; do
      ! port_open "$port" || die "port $port is taken by another process"
    done
    t0=$SECONDS
    say "starting"
    svc_launch 9>&-
  fi
  until svc_ready 9>&-; do
    if ! pid=$(svc_pid); then
      tail -n 25 "$SVC_HOME/log" >&2 || true
      die "stopped while starting; log: $SVC_HOME/log"
    fi
    if [ $((SECONDS - t0)) -ge "$START_TIMEOUT_S" ]; then
      tail -n 25 "$SVC_HOME/log" >&2 || true
      svc_kill
      die "not ready after ${START_TIMEOUT_S} s; log: $SVC_HOME/log"
    fi
    sleep 0.2
  done
  say "ready after $((SECONDS - t0)) s (pid $(svc_pid))"
  svc_address
}

# SIGTERM, then SIGKILL to the process group.
svc_kill() {
  local pid t0=$SECONDS
  pid=$(svc_pid) || { rm -f "$SVC_HOME/pid"; return 0; }
  kill -s TERM "$pid" 2>/dev/null || true
  while svc_pid >/dev/null; do
    if [ $((SECONDS - t0)) -ge "$STOP_TIMEOUT_S" ]; then
      say "did not stop in ${STOP_TIMEOUT_S} s; killing it"
      kill -s KILL -- "-$pid" 2>/dev/null || kill -s KILL "$pid" 2>/dev/null || true
      sleep 0.2
      break
    fi
    sleep 0.1
  done
  rm -f "$SVC_HOME/pid"
}

svc_stop() {
  if svc_pid >/dev/null; then svc_kill; say stopped; else rm -f "$SVC_HOME/pid"; say "not running"; fi
}

svc_status() {
  local pid
  if ! pid=$(svc_pid); then say "not running"; return 3; fi
  if ! svc_ready; then say "running (pid $pid) but not ready"; return 4; fi
  say "running (pid $pid)"
  svc_address
}

# Installed when the stamp carries the wanted version.
svc_installed() { [ "$(cat "$SVC_HOME/installed" 2>/dev/null)" = "$SVC_VERSION" ]; }
svc_mark_installed() { printf '%s\n' "$SVC_VERSION" >"$SVC_HOME/installed"; }

svc_main() {
  SVC_HOME=$SERVICES_DIR/$SVC
  case "${1:-}" in
    install)
      mkdir -p "$SVC_HOME"
      if svc_installed; then
        say "already installed ($SVC_VERSION)"
      else
        say "installing $SVC_VERSION"
        svc_install
        say "installed"
      fi ;;
    start) svc_start ;;
    stop) svc_stop ;;
    status) svc_status ;;
    address) svc_address ;;
    *) printf 'usage: %s install|start|stop|status|address\n' "${0##*/}" >&2; exit 2 ;;
  esac
}

# ---- ways to install --------------------------------------------------------------------------

# mvn_closure DIR GROUP:ARTIFACT:VERSION...: the jars and all they need at run time.
mvn_closure() {
  local dir=$1 pom=$SVC_HOME/pom.xml gav g a v; shift
  need mvn "Apache Maven"
  {
    printf '<project><modelVersion>4.0.0</modelVersion><groupId>local</groupId><artifactId>%s</artifactId><version>1</version><dependencies>\n' "$SVC"
    for gav in "$@"; do
      IFS=: read -r g a v <<<"$gav"
      printf '<dependency><groupId>%s</groupId><artifactId>%s</artifactId><version>%s</version></dependency>\n' "$g" "$a" "$v"
    done
    printf '</dependencies></project>\n'
  } >"$pom"
  rm -rf "$dir"
  # shellcheck disable=SC2086
  mvn -B -q ${MVN_ARGS:-} -f "$pom" org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies \
    -DincludeScope=runtime -DoutputDirectory="$dir" >"$SVC_HOME/mvn.log" 2>&1 || {
    grep -m 3 ERROR "$SVC_HOME/mvn.log" >&2 || tail -n 5 "$SVC_HOME/mvn.log" >&2
    die "Maven could not resolve $*"
  }
}

# java_at_least N: prints a java of that version or newer, JAVA_HOME's first.
java_at_least() {
  local want=$1 j v
  for j in "${JAVA_HOME:+$JAVA_HOME/bin/java}" "$(command -v java || true)" /usr/lib/jvm/*/bin/java; do
    [ -n "$j" ] && [ -x "$j" ] || continue
    v=$("$j" -version 2>&1 | sed -n '1s/.*version "\(1\.\)\{0,1\}\([0-9]*\).*/\2/p')
    if [ -n "$v" ] && [ "$v" -ge "$want" ]; then printf '%s\n' "$j"; return 0; fi
  done
  die "needs Java $want or newer (set JAVA_HOME)"
}
