#!/bin/sh
# Run one step of the set-up: step.sh STAMP TITLE COMMAND. The output goes to STAMP.log; STAMP is
# made at the end, so that the next run begins with the step that failed or was interrupted.
stamp=$1 title=$2 command=$3
echo "set-up: $title"
mkdir -p "$(dirname "$stamp")"
if sh -c "set -ex; $command" >"$stamp.log" 2>&1; then
    touch "$stamp"
    exit 0
fi
tail -n 15 "$stamp.log" | sed 's/^/    /'
echo "set-up stopped at: $title"
echo "    log: $stamp.log"
echo "    what to do: $("${PYTHON:-python3}" -m mmattn.doctor --log "$stamp.log");" \
    "then run the same command again, it goes on from here"
exit 1
