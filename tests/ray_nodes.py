"""A Ray cluster on this machine, each node with processes of its own: prints its address, then does what it is told.

"kill" ends a node as if its power had failed, "add" adds one; the end of the input ends all.
"""

import sys

from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
cluster.wait_for_nodes()
print(cluster.address, flush=True)
for line in sys.stdin:
    if line == "kill\n":
        cluster.remove_node(nodes.pop(), allow_graceful=False)
    else:
        nodes.append(cluster.add_node(num_cpus=1))
        cluster.wait_for_nodes()
    print("done", flush=True)
cluster.shutdown()
