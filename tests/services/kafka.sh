#!/usr/bin/env bash
# Apache Kafka: one KRaft node (broker and controller), plaintext, topics are made on purpose only.
#   KAFKA_VERSION, KAFKA_PORT (9092), KAFKA_CONTROLLER_PORT (9093), KAFKA_HEAP (512m)
# Another KAFKA_PORT is another node with data of its own (SVC_HOME gets the port as a suffix); they
# share one installation.
SVC_VERSION=${KAFKA_VERSION:-4.3.1}
PORT=${KAFKA_PORT:-9092}
CPORT=${KAFKA_CONTROLLER_PORT:-$((PORT + 1))}
SVC=kafka
[ "$PORT" = 9092 ] || SVC=kafka-$PORT
# shellcheck disable=SC2034
SVC_PORTS="$PORT $CPORT"
# shellcheck source=tests/services/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
LIBS=$SERVICES_DIR/kafka/libs

# All nodes look at the one stamp beside the jars.
svc_installed() { [ "$(cat "$SERVICES_DIR/kafka/installed" 2>/dev/null)" = "$SVC_VERSION" ]; }

svc_install() {
  mkdir -p "$SERVICES_DIR/kafka"
  # kafka_2.13 is the broker, kafka-tools formats its directory.
  mvn_closure "$LIBS" "org.apache.kafka:kafka_2.13:$SVC_VERSION" "org.apache.kafka:kafka-tools:$SVC_VERSION" \
    "org.apache.logging.log4j:log4j-slf4j-impl:2.25.4"
  printf '%s\n' "$SVC_VERSION" >"$SERVICES_DIR/kafka/installed"
}

conf() {
  mkdir -p "$SVC_HOME/conf" "$SVC_HOME/data"
  cat >"$SVC_HOME/conf/server.properties" <<CONF
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@$SVC_HOST:$CPORT
listeners=PLAINTEXT://$SVC_HOST:$PORT,CONTROLLER://$SVC_HOST:$CPORT
advertised.listeners=PLAINTEXT://$SVC_HOST:$PORT
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs=$SVC_HOME/data
auto.create.topics.enable=false
num.partitions=1
# One broker: the internal topics cannot have more than one replica.
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=4
group.initial.rebalance.delay.ms=0
# A test broker stays small.
log.retention.bytes=2147483648
log.segment.bytes=268435456
log.cleaner.dedupe.buffer.size=16777216
CONF
  # Kafka's own log goes to the bounded file that svc_spawn keeps.
  cat >"$SVC_HOME/conf/log4j2.yaml" <<'LOG'
Configuration:
  Appenders:
    Console:
      name: out
      PatternLayout: {pattern: "[%d] %p %m (%c)%n"}
  Loggers:
    Root:
      level: WARN
      AppenderRef: {ref: out}
LOG
}

svc_launch() {
  local java
  java=$(java_at_least 17)
  conf
  if [ ! -f "$SVC_HOME/data/meta.properties" ]; then
    "$java" -Xmx256m -cp "$SVC_HOME/conf:$LIBS/*" kafka.tools.StorageTool format \
      --config "$SVC_HOME/conf/server.properties" \
      --cluster-id "$(head -c 16 /dev/urandom | base64 | tr '+/' '-_' | tr -d =)" \
      >"$SVC_HOME/format.log" 2>&1 || { cat "$SVC_HOME/format.log" >&2; die "could not format the data directory"; }
  fi
  svc_spawn "$java" -server -Xms"${KAFKA_HEAP:-512m}" -Xmx"${KAFKA_HEAP:-512m}" -XX:+UseG1GC \
    -Dlog4j2.configurationFile="$SVC_HOME/conf/log4j2.yaml" \
    -cp "$SVC_HOME/conf:$LIBS/*" kafka.Kafka "$SVC_HOME/conf/server.properties"
}

# The broker opens its client port only once it can serve.
svc_ready() { port_open "$PORT"; }

svc_address() { printf '%s:%s\n' "$SVC_HOST" "$PORT"; }

svc_main "$@"
