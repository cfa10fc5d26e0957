#!/usr/bin/env bash
# What a machine of a cluster does, in the order in which the cluster files call it:
#   settings NAME=VALUE ...   remember settings of the cluster
#   setup [EXTRA ...]         install lepton_ray as constraints.txt says; quick when nothing changed
#   head                      make the secrets, start Ray's head and the MLflow server
#   worker                    start Ray as a worker of $RAY_HEAD_IP
#   stop                      stop what `head` and `worker` started besides Ray
#   leave                     wait until the raylet has ended, then stop the rest of Ray; `worker` calls it
#
# Settings:
#   LEPTON_STORAGE          folder or URI that all machines reach: results, checkpoints, models
#   LEPTON_MLFLOW_DB        postgresql://... instead of SQLite on the head's disk
#   LEPTON_ARTIFACTS        where MLflow keeps models, if not under LEPTON_STORAGE
#   LEPTON_GCS              where Ray's own state outlives a head that starts again: `disk`, in ~/.lepton_ray/gcs of
#                           the head, or HOST:PORT of a Redis
#   LEPTON_MARKET           aws, gcp or azure: whose interruption notices to listen to on spot machines
#   LEPTON_NODE_IP          this machine's address, where Ray would guess a wrong one
#   LEPTON_VENV             an environment that has everything already (an image): nothing is installed
#   TORCH_INDEX             wheel index of the build of PyTorch; default the one for CPUs
# Secrets are no settings: they are made here, on the head, and go to the workers by
# `cluster_synced_files`. They are files of mode 0600 and never on a command line.
set -euo pipefail
umask 077

SOURCE=$(cd "$(dirname "$0")/.." && pwd)
STATE=$HOME/.lepton_ray
TOKEN=$HOME/.ray/auth_token
SECRETS=$STATE/secrets
PORT=6379
MLFLOW_PORT=5000
METRICS_PORT=8090
mkdir -p "$STATE" "$HOME/.ray"

fail() { echo "lepton_ray: $*" >&2; exit 1; }

settings() {
    printf 'export %q\n' "$@" > "$STATE/settings"
}

load() {
    if [ -f "$STATE/settings" ]; then . "$STATE/settings"; fi
    VENV=${LEPTON_VENV:-$STATE/venv}
    export PATH="$VENV/bin:$PATH"
}

setup() {
    load
    # What every later shell needs; written whole, so that an old line never stays.
    {
        cat "$STATE/settings" 2>/dev/null || true
        printf 'export PATH=%q:$PATH RAY_AUTH_MODE=token\n' "$VENV/bin"
    } > "$STATE/env"
    grep -qs 'lepton_ray/env' "$HOME/.bashrc" || echo '. ~/.lepton_ray/env' >> "$HOME/.bashrc"
    if [ -z "${LEPTON_VENV:-}" ]; then install_package "$@"; fi
    ray --version
}

install_package() {
    local wanted
    wanted=$(cd "$SOURCE" && { echo "$@" "${TORCH_INDEX:-}"; cat pyproject.toml constraints.txt;
        find lepton_ray -name '*.py' -print0 | sort -z | xargs -0 cat; } | sha256sum)
    [ "$(cat "$VENV/.installed" 2>/dev/null)" = "$wanted" ] && return
    if [ ! -x "$VENV/bin/python" ]; then
        local python=
        for name in python3.11 python3.12 python3.13; do
            if command -v "$name" >/dev/null; then python=$name; break; fi
        done
        if [ -z "$python" ]; then
            python3 -m pip install --user --quiet "uv==0.11.*"
            python=$(python3 -m uv python install --quiet 3.11 && python3 -m uv python find 3.11)
        fi
        "$python" -m venv "$VENV"
    fi
    local torch extras
    torch=$(grep '^torch==' "$SOURCE/constraints.txt")
    extras=$(IFS=,; echo "$*")
    "$VENV/bin/pip" install --quiet \
        --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" "$torch"
    "$VENV/bin/pip" install --quiet -c "$SOURCE/constraints.txt" "$SOURCE${extras:+[$extras]}"
    echo "$wanted" > "$VENV/.installed"
}

make_secret() {  # FILE COMMAND...: once, whole, readable by nobody else
    local file=$1; shift
    [ -s "$file" ] && return
    "$@" > "$file.new"
    mv "$file.new" "$file"
}

random() { python -c 'import secrets; print(secrets.token_hex(32))'; }

mlflow_secrets() {
    echo "export MLFLOW_TRACKING_USERNAME=admin"
    echo "export MLFLOW_TRACKING_PASSWORD=$(random)"
}

keep_state() {
    case ${LEPTON_GCS:-} in
        '') return ;;
        disk) export RAY_gcs_storage=rocksdb RAY_gcs_storage_path=$STATE/gcs ;;
        # A password would be on the command line of Ray's GCS: the network must keep others away.
        *@*) fail "LEPTON_GCS is HOST:PORT without a password, which Ray would show: $LEPTON_GCS" ;;
        *:*) export RAY_REDIS_ADDRESS=$LEPTON_GCS RAY_external_storage_namespace=lepton_ray ;;
        *) fail "LEPTON_GCS must be disk or HOST:PORT of a Redis: $LEPTON_GCS" ;;
    esac
    # How long the other machines wait for their head (Ray: 60 s).
    export RAY_gcs_rpc_server_reconnect_timeout_s=600
}

check_token() {
    [ -s "$TOKEN" ] || fail "no token in $TOKEN: Ray does not start without one"
    [ "$(stat -c %a "$TOKEN")" = 600 ] || fail "$TOKEN must be readable by its owner only: chmod 600"
    [ -n "${LEPTON_STORAGE:-}" ] || fail "LEPTON_STORAGE is not set: see the top of the cluster file"
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$TOKEN RAY_USAGE_STATS_ENABLED=0
    keep_state
}

# A lost machine is noticed in 15 s (Ray: 50 s): 5 checks, 2 s apart, of 5 s each at most.
export RAY_health_check_period_ms=2000 RAY_health_check_timeout_ms=5000 RAY_health_check_failure_threshold=5

# Workers import these before work comes: a replica starts seconds sooner.
export RAY_preload_python_modules=torch,ray.train,ray.tune

# Replicas of endpoints wait for nobody; what computes makes itself nice (`lepton_ray.priority`).
export RAY_worker_niceness=0

# Endpoints are what they are on a laptop: `lepton_ray.jobs.proxy.EVERYWHERE`, which a test compares.
export RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1 RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60
export RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S=1 RAY_SERVE_HAPROXY_METRICS_ENABLED=0
export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=lepton_ray.serving.short:middleware
export RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH=lepton_ray.priority:look_after
export RAY_SERVE_CONTROL_LOOP_INTERVAL_S=0.5
export RAY_SERVE_HAPROXY_HEALTH_CHECK_FASTINTER=2s RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL=3
export RAY_SERVE_HAPROXY_RETRY_ON="conn-failure empty-response" RAY_SERVE_HAPROXY_TUNE_BUFSIZE=65536

start_ray() {
    ulimit -n 65536 2>/dev/null || true
    ray start "$@" ${LEPTON_NODE_IP:+--node-ip-address="$LEPTON_NODE_IP"} \
        --metrics-export-port="$METRICS_PORT" --disable-usage-stats
}

background() {  # NAME COMMAND...: goes on after the ssh session, found again by its process id
    local name=$1; shift
    nohup "$@" >> "$STATE/$name.log" 2>&1 < /dev/null &
    echo $! > "$STATE/$name.pid"
}

watch_spot() {
    if [ -n "${LEPTON_MARKET:-}" ]; then
        background spot python -m lepton_ray.jobs.node.spot "$LEPTON_MARKET" "$1"
    fi
}

head() {
    load
    make_secret "$TOKEN" random
    make_secret "$SECRETS" mlflow_secrets
    make_secret "$STATE/mlflow_key" random
    check_token
    . "$SECRETS"
    local ip=${LEPTON_NODE_IP:-$(hostname -I | cut -d' ' -f1)}
    export MLFLOW_TRACKING_URI=http://$ip:$MLFLOW_PORT
    background tracking python -m lepton_ray.jobs.node.tracking \
        --host "$ip" --port "$MLFLOW_PORT" --ray-port "$PORT" --folder "$STATE/mlflow" \
        --key "$STATE/mlflow_key"
    # What the cluster may grow to; the driver of a job plans with it.
    export LEPTON_CLUSTER_FILE=$HOME/ray_bootstrap_config.yaml
    # No CPU and no GPU: work goes to workers. The dashboard is reached by `ray dashboard` (ssh) only.
    start_ray --head --port="$PORT" --num-cpus=0 --num-gpus=0 --dashboard-host=127.0.0.1 \
        --autoscaling-config="$HOME/ray_bootstrap_config.yaml" ${LEPTON_RAY_OPTIONS:-}
}

worker() {
    load
    check_token
    [ -s "$SECRETS" ] || fail "no $SECRETS: the head makes it, cluster_synced_files brings it"
    . "$SECRETS"
    export MLFLOW_TRACKING_URI=http://$RAY_HEAD_IP:$MLFLOW_PORT
    start_ray --address="$RAY_HEAD_IP:$PORT" ${LEPTON_RAY_OPTIONS:-}
    watch_spot "$RAY_HEAD_IP:$PORT"
    background leave bash "$SOURCE/cluster/node.sh" leave
}

# A raylet ends when its head has gone, by `ray down` or for good. Ray's log monitor does not.
leave() {
    load
    while grep -qsx raylet /proc/[0-9]*/comm; do sleep 2; done
    exec ray stop
}

stop() {
    local file
    for file in "$STATE"/*.pid; do
        [ -e "$file" ] || continue
        # The id may be another process's by now.
        if tr '\0' ' ' 2>/dev/null < "/proc/$(cat "$file")/cmdline" |
            grep -Eq 'lepton_ray.jobs.node|node.sh leave|ray stop'; then
            kill "$(cat "$file")"
            for _ in $(seq 60); do kill -0 "$(cat "$file")" 2>/dev/null || break; sleep 0.5; done
        fi
        rm -f "$file"
    done
}

command=${1:?settings, setup, head, worker, stop or leave}; shift
case $command in
    settings|setup|head|worker|stop|leave) "$command" "$@" ;;
    *) fail "unknown: $command" ;;
esac
