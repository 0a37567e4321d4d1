"""What tests of generation share: transformers' answer in the same form as ours."""

import pytest

EOS = (3, 8, 50)  # ids that the random models take at unlike times


def reference(theirs, ids, mask, *, new, eos=(), **options):
    """(tokens of each row, with the one that ended it; scores of a beam search)."""
    torch = pytest.importorskip("torch")
    found = theirs.generate(
        torch.tensor(ids).long(),
        attention_mask=torch.tensor(mask).long(),
        max_new_tokens=new,
        eos_token_id=list(eos) or None,
        pad_token_id=0,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    rows = found.sequences[:, ids.shape[1] :].tolist()
    ends = [next((n + 1 for n, x in enumerate(row) if x in eos), new) for row in rows]
    return [row[:n] for row, n in zip(rows, ends, strict=True)], found.get("sequences_scores")


def prompts_of(ids, mask):
    """A batch's rows without their padding."""
    return [row[real == 1] for row, real in zip(ids, mask, strict=True)]


def ids_of(made):
    return [row.ids for row in made]
