"""Sparse attention written out one query at a time from the papers, independent of the package's own references."""

import torch


def nsa_one_document(q, k, v, gates, size, count, window):
    """q [Tq, H, K], k [Tk, Hk, K], v [Tk, Hk, V], gates [Tq, H, 3] of one document -> [Tq, H, V]."""
    T, (n, H, K), heads = k.shape[0], q.shape, k.shape[1]
    group, scale, rows = H // heads, K**-0.5, []
    complete = T // size
    k_mean = torch.stack([k[c * size : (c + 1) * size].mean(0) for c in range(complete)]) if complete else None
    v_mean = torch.stack([v[c * size : (c + 1) * size].mean(0) for c in range(complete)]) if complete else None
    for i in range(n):
        t = T - n + i
        for head in range(heads):
            mine = slice(head * group, (head + 1) * group)
            done, own = (t + 1) // size, t // size
            compressed, importance = 0.0, {}
            if done:
                weights = (q[i, mine] @ k_mean[:done, head].T * scale).softmax(-1)
                compressed = weights @ v_mean[:done, head]
                importance = {c: weights[:, c].sum().item() for c in range(min(own, done))}
            must = [c for c in (own, own - 1, 0) if c >= 0]
            rank = [*dict.fromkeys(must), *sorted(set(importance) - set(must), key=lambda c: (-importance[c], c))]
            seen = sorted(j for c in rank[:count] for j in range(c * size, min((c + 1) * size, t + 1)))
            near = list(range(max(0, t - window + 1), t + 1))
            parts = [(q[i, mine] @ k[keys, head].T * scale).softmax(-1) @ v[keys, head] for keys in (seen, near)]
            g = gates[i, mine]
            rows.append(g[:, :1] * compressed + g[:, 1:2] * parts[0] + g[:, 2:] * parts[1])
    return torch.stack(rows).reshape(n, H, -1)


def moba_one_document(q, k, v, size, topk):
    """q [Tq, H, K], k [Tk, Hk, K], v [Tk, Hk, V] of one document -> [Tq, H, V]."""
    T, (n, H, K) = k.shape[0], q.shape
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    rows = []
    for i in range(n):
        t = T - n + i
        own = t // size
        for h in range(H):
            likes = [(q[i, h] @ k[c * size : (c + 1) * size, h].mean(0)).item() for c in range(own)]
            best = sorted(range(own), key=lambda c: (-likes[c], c))[: topk - 1]
            keys = [j for c in best for j in range(c * size, (c + 1) * size)] + list(range(own * size, t + 1))
            rows.append((q[i, h] @ k[keys, h].T * K**-0.5).softmax(-1) @ v[keys, h])
    return torch.stack(rows).reshape(n, H, -1)


def by_document(function, bounds, tensors, *options):
    """The oracle over a batch of rows, or over the packed documents of one row."""
    if bounds is None:
        return torch.stack([function(*row, *options) for row in zip(*tensors)])
    cuts = [x[0].split(bounds.diff().tolist()) for x in tensors]
    return torch.cat([function(*document, *options) for document in zip(*cuts) if len(document[0])])[None]
