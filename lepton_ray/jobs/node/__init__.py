"""What runs beside Ray on the machines of a cluster; `cluster/node.sh` starts it."""
