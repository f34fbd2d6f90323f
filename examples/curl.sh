#!/usr/bin/env bash
# The whole way with curl alone: upload a model and data, submit a job, poll it, read the numbers, download and verify.
# usage: examples/curl.sh DIRECTORY     with model.pt2, data.npz and held_out.npz (examples/make_inputs.py makes them)
# The recipe below is for data with the columns "pixels" and "label" and a model with one input named "input".
set -euo pipefail
url=${PARE_URL:-http://127.0.0.1:8000}
directory=$1
out=$directory/artifacts

# The key of a service that asks for one, from a file, because other users can read command lines.
curl() {
  if [ -n "${PARE_API_KEY:-}" ]; then
    command curl --config <(printf 'header = "Authorization: Bearer %s"\n' "$PARE_API_KEY") "$@"
  else
    command curl "$@"
  fi
}

# Reads one field of a JSON document: `field status < document`. jq does the same where it is installed.
field() { python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]] or "")' "$1"; }
wait_until_checked() {
  until state=$(curl -sS --fail-with-body "$url/v1/$1" | field state) && [ "$state" != checking ]; do sleep 0.2; done
  echo "$1 is $state"
}

upload() { curl -sS --fail-with-body -X POST -T "$directory/$2" "$url/v1/$1?name=$2&format=${2##*.}" | field id; }
model=$(upload models model.pt2)
data=$(upload datasets data.npz)
held_out=$(upload datasets held_out.npz)
for id in "models/$model" "datasets/$data" "datasets/$held_out"; do wait_until_checked "$id"; done

job=$(curl -sS --fail-with-body "$url/v1/jobs" -H 'Content-Type: application/json' \
  -H "Idempotency-Key: \"$model\"" -d @- <<JSON | field id
{
  "model_id": "$model",
  "recipe": {
    "steps": [
      {"kind": "prune_structured", "ratio": 0.5},
      {"kind": "finetune", "epochs": 3},
      {"kind": "quantize_int8", "mode": "dynamic"}
    ],
    "data": {
      "dataset_id": "$data",
      "evaluation_dataset_id": "$held_out",
      "inputs": {"input": {"column": "pixels"}},
      "label_column": "label",
      "task": "classification"
    }
  }
}
JSON
)

last=
while now=$(curl -sS --fail-with-body "$url/v1/jobs/$job"); do
  status=$(field status <<<"$now")
  state="$status $(field stage <<<"$now")"
  [ "$state" = "$last" ] || echo "jobs/$job is $state"
  last=$state
  case $status in succeeded) break ;; failed | cancelled) echo "$now"; exit 1 ;; esac
  sleep 1
done

curl -sS --fail-with-body "$url/v1/jobs/$job" | python3 -m json.tool | sed -n '/"verdict"/,/^    }/p'

mkdir -p "$out"
curl -sS --fail-with-body "$url/v1/jobs/$job/artifacts" \
  | python3 -c 'import json, sys; [print(a["id"], a["sha256"], a["name"]) for a in json.load(sys.stdin)["items"]]' \
  | while read -r id sha256 name; do
      curl -sS --fail-with-body -o "$out/$name" "$url/v1/artifacts/$id"
      echo "$sha256  $out/$name" | sha256sum --check
    done
